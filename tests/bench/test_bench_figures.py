"""The figures in bench/ show what their result files hold."""

from __future__ import annotations

import pytest

from bench.lib.results import write_rows

pytest.importorskip("matplotlib")

COLUMNS = ("shape", "hidden_size", "intermediate_size", "dtype", "tokens", "path", "sparsity", "us")
MACHINE = {"device": "a card", "torch": "2", "commit": "abc"}
ROWS = [
    ("small", 64, 128, "bf16", 1, "dense", 0.0, 12.0),
    ("small", 64, 128, "bf16", 1, "dense", 0.0, 10.0),
    ("small", 64, 128, "bf16", 2, "dense", 0.0, 1.0),
    ("small", 64, 128, "bf16", 1, "sparse_mlp", 0.9, 4.0),
    ("small", 64, 128, "bf16", 1, "sparse_mlp", 0.0, 9.0),
    ("small", 64, 128, "fp32", 1, "sparse_mlp", 0.0, 2.0),
    ("small", 64, 128, "fp16", 1, "teal_triton", 0.5, 7.0),
    ("large", 64, 256, "bf16", 1, "dense", 0.0, 20.0),
    ("large", 64, 256, "bf16", 1, "sparse_mlp", 0.5, 15.0),
]


def test_figure_3_draws_one_token_of_one_dtype(tmp_path):
    from bench.tables import mlp_figure

    file = tmp_path / "mlp.csv"
    write_rows(file, [dict(zip(COLUMNS, row, strict=True)) | MACHINE for row in ROWS])
    figure = mlp_figure.draw(file)
    lines = [{str(line.get_label()): line.get_xydata().tolist() for line in axis.lines} for axis in figure.axes]
    label = {path: text for path, (text, *_) in mlp_figure.PATHS.items()}
    assert lines[0] == {
        label["dense"]: [[0, 10], [90, 10]],
        label["teal_triton"]: [[50, 7]],
        label["sparse_mlp"]: [[0, 9], [90, 4]],
    }
    assert lines[1] == {label["dense"]: [[0, 20], [50, 20]], label["sparse_mlp"]: [[50, 15]]}
    figure.savefig(tmp_path / "mlp.png")
    with pytest.raises(SystemExit, match="no row with dtype fp64"):
        mlp_figure.draw(file, "fp64")
