"""Writes docs/models.md from the families that the tests run; tests/test_families.py checks that it is current.

python tests/models_table.py
"""

from __future__ import annotations

from pathlib import Path

from support.models import FAMILIES, MIXTURES, REFUSED, tiny_model

from cats_ext.patching.detection import MERGED, SEPARATE, find_gated_mlps

HEAD = """# Models

Made by `tests/models_table.py` from what `tests/test_families.py` and `tests/test_experts.py` run: a tiny random model
of each family, on the CPU and on a GPU. Models are recognised by the structure of their MLPs, not by name: one that is
not in the table works if each MLP has the projections and an activation of the table and computes
`down(act(gate) * up)`, which is checked by running it.

## Supported

"""
MIXTURES_HEAD = """
## Mixtures of experts

With transformers 5 the weights of a layer's experts are two parameters, `gate_up_proj` `[E, 2 I, H]` and `down_proj`
`[E, H, I]`. Routing stays the model's. Thresholds are one a layer, from quantiles over all tokens routed to any expert;
a few tokens run sparsely inside each expert that they take, more of them on transformers' own grouped products with the
mask in between. Layers without experts, and experts that every token takes, are MLPs as above.

"""
REFUSED_HEAD = """
## Refused

`apply_cats`, `calibrate` and `from_pretrained(..., quantization_config=...)` raise a `ValueError` with this reason and
leave the model as it was.

"""


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]) + "\n"


def document() -> str:
    supported = []
    for name, family in FAMILIES.items():
        mlp = find_gated_mlps(tiny_model(name))[0]
        projections = ", ".join(f"`{projection}`" for projection in (MERGED if mlp.merged else SEPARATE))
        supported.append([family.title, f"`{type(mlp.module).__name__}`", projections, mlp.activation])
    mixtures = []
    for name, family in MIXTURES.items():
        kinds = {}
        for mlp in find_gated_mlps(tiny_model(name)):
            kinds.setdefault(f"`{type(mlp.module).__name__}`", (bool(mlp.experts), mlp.activation))
        routed = ", ".join(kind for kind, (experts, _) in kinds.items() if experts)
        others = ", ".join(kind for kind, (experts, _) in kinds.items() if not experts)
        mixtures.append([family.title, routed, others, next(iter(kinds.values()))[1]])
    refused = []
    for name, family in REFUSED.items():
        try:
            find_gated_mlps(tiny_model(name))
        except ValueError as error:
            refused.append([family.title, str(error).split(" cannot run sparsely: ")[-1]])
    tables = (
        table(["family", "MLP class", "projections", "activation"], supported),
        table(["family", "experts", "other MLPs", "activation"], mixtures),
        table(["family", "reason"], refused),
    )
    return HEAD + tables[0] + MIXTURES_HEAD + tables[1] + REFUSED_HEAD + tables[2]


if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "models.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(document())
