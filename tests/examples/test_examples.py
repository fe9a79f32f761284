"""Every file of examples/ runs as it stands, on a tiny model."""

from __future__ import annotations

import json
import runpy
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from support.saved_model import save_tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}a: "

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory with a model and a text, which is the working directory."""
    save_tiny_model(tmp_path / "my-model")
    (tmp_path / "text.txt").write_text("The cat sat on a mat, and so did that other cat. " * 80)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def calibrate(monkeypatch) -> None:
    run(monkeypatch, "calibrate.py", "./my-model", "text.txt", "thresholds", "--max-tokens", 1024)


def test_all_are_listed_and_tested():
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    listed, tested = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    assert files and all(f"[{name}]({name})" in listed and f'"{name}"' in tested for name in files)


def test_calibrate_generate_and_evaluate(workplace, monkeypatch, capsys):
    calibrate(monkeypatch)
    assert "of the MLP weights" in capsys.readouterr().out and (workplace / "thresholds" / "cats_config.json").exists()
    run(monkeypatch, "generate.py", "./my-model", "thresholds", "The cat", "--tokens", 4)
    shown = capsys.readouterr().out
    assert all(f"{name}, " in shown for name in ("dense", "30% skipped", "50% skipped", "70% skipped"))
    run(monkeypatch, "evaluate.py", "./my-model", "thresholds", "text.txt", "--window", 64, "--max-windows", 2)
    assert capsys.readouterr().out.count("same top token") == 3


def test_quantise(workplace, monkeypatch, capsys):
    run(monkeypatch, "quantise.py", "./my-model", "text.txt", "small", "--weights", "int8", "--max-tokens", 1024)
    assert "of the MLP weights" in capsys.readouterr().out and (workplace / "small" / "config.json").exists()


def test_chat(workplace, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import cats_ext

    calibrate(monkeypatch)
    model = AutoModelForCausalLM.from_pretrained("my-model")
    cats_ext.apply_cats(model, cats_ext.CatsConfig.from_pretrained("thresholds")).save_pretrained("sparse")
    tokenizer = AutoTokenizer.from_pretrained("my-model")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained("sparse")
    questions = iter(["Hi", "And?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(questions))
    run(monkeypatch, "chat.py", "sparse", "--tokens", 3)
    assert next(questions, None) is None


def test_finetune(workplace, monkeypatch, capsys):
    pytest.importorskip("peft")
    run(monkeypatch, "finetune.py", "./my-model", "text.txt", "tuned", "--steps", 2, "--length", 32)
    assert "perplexity after" in capsys.readouterr().out and (workplace / "tuned" / "cats_config.json").exists()


class _Server(BaseHTTPRequestHandler):
    """The two routes of OpenAI's interface that the client asks."""

    def _send(self, body: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "tiny"}]}))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "tiny" and asked["messages"][0]["content"] == "Why?"
        pieces = [{"role": "assistant"}, {"content": "Be"}, {"content": "cause."}]
        events = [json.dumps({"choices": [{"delta": piece}]}) for piece in pieces]
        self._send("".join(f"data: {event}\n\n" for event in [*events, json.dumps({"choices": []}), "[DONE]"]))

    def log_message(self, *_: object) -> None:
        pass


def test_client(monkeypatch, capsys):
    with HTTPServer(("127.0.0.1", 0), _Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            run(monkeypatch, "client.py", "Why?", "--url", f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert capsys.readouterr().out == "Because.\n"


def test_notebook(workplace, monkeypatch):
    """Its cells as a script; nothing of them needs Jupyter."""
    pytest.importorskip("matplotlib").use("Agg")
    cells = json.loads((EXAMPLES / "activations.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    names: dict = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "activations.ipynb", "exec"), names)
    assert len(names["points"]) == 5 and names["points"][0][1] == pytest.approx(names["result"].dense.ppl)
