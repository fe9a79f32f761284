"""Decoding and time to first token under vLLM, dense and with CATS, at 1 to 256 sequences.

    python bench serving.engine --output bench/results/h200/serving.csv

Three engines run at a time, each in a process with its own weights: the dense checkpoint, the CATS checkpoint, and the
latter with the sparse kernel for up to --kernel-tokens tokens, which measures MAX_SERVED_TOKENS of
cats_ext/ops/dispatch.py. With --awq there is a fourth, of AWQ's int4 in groups of 128 with random weights and vLLM's
own kernels. They are timed in turns on otherwise idle GPUs, --tensor-parallel for each. The sparsity is set in the
running engine. A step's time is the median over --repetitions of an output's, which is the median over its windows of
16 steps: neither the prompts' step nor one that the host delays counts, nor do the quick ones that follow such a delay.
To the first token, at the first of --sparsities only, it is the median over 16 times as many turns, each with the
median of five prompts one after the other. A speedup is the median of the turns', for hosts change their speed; every
second turn has the engines in the other order. Tokens are sampled at temperature 1, since a random model's greedy text
repeats itself.
Sizes at which no engine takes the kernel are timed at the first of --sparsities only, for the masked products read all
weights at each. Rows are written as they come; --seconds ends the run. Weights are random, thresholds calibrated on
random tokens with the paper's rule.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.lib import machine
from bench.lib.command import command
from bench.lib.models import CONFIGS, random_model
from bench.lib.results import ResultFile
from cats_ext.ops.dispatch import MAX_SERVED_TOKENS

if TYPE_CHECKING:
    from vllm import LLM

OUTPUT, WINDOW = 80, 16  # tokens, which are steps
PROMPT = 32
FIRST_TOKEN_PROMPT = 1024
FIRST_TOKEN_TURNS = 16  # times as many as of outputs: each takes milliseconds, and they differ by some percent
FIRST_TOKENS = 5  # in a turn
LIMIT = "BENCH_MAX_SERVED_TOKENS"


def make_checkpoints(name: str, layers: int | None, directory: Path, device: str) -> dict[str, Path]:
    """A CATS checkpoint, and the same weights without thresholds."""
    import cats_ext

    config = CONFIGS[name]()
    config.num_hidden_layers = layers or config.num_hidden_layers
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = random_model(config, dtype, device).eval().requires_grad_(False)
    ids = torch.randint(0, config.vocab_size, (4096,), generator=torch.Generator().manual_seed(0))
    thresholds = cats_ext.calibrate(model, ids, rule="plain", sparsity=0.5, sequence_length=1024, progress=False)
    sparse, dense = directory / "sparse", directory / "dense"
    cats_ext.apply_cats(model, thresholds).save_pretrained(sparse)
    dense.mkdir()
    for path in sparse.iterdir():
        if not path.name.startswith("cats_"):
            shutil.copy(path, dense) if path.suffix == ".json" else os.link(path, dense / path.name)
    written = json.loads((dense / "config.json").read_text())
    del written["quantization_config"]
    (dense / "config.json").write_text(json.dumps(written))
    return {"dense": dense, "sparse": sparse}


def describe_awq(dense: Path, directory: Path) -> Path:
    """The config of the dense checkpoint in AWQ's int4; its weights are vLLM's dummies."""
    directory.mkdir()
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def serve(
    pipe: Connection, directory: Path, sizes: list[int], kernel_tokens: int | None, ranks: int, cache: Path
) -> None:
    """One engine, which does what it is sent: ``("set", sparsity)``, ``("decode" or "first_token", sequences)``."""
    os.environ |= {"VLLM_CACHE_ROOT": str(cache), "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if kernel_tokens is not None:
        os.environ[LIMIT] = str(kernel_tokens)
    from vllm import LLM
    from vllm import __version__ as version

    from cats_ext.integrations.vllm import set_sparsity

    started = time.perf_counter()
    llm = LLM(
        str(directory),
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=max(sizes),
        gpu_memory_utilization=0.15,  # of what has to be free at the start; the next line sizes the cache
        kv_cache_memory_bytes=(8 << 30) if torch.cuda.is_available() else (256 << 20),
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": sizes} if torch.cuda.is_available() else {},
        worker_extension_cls="bench.serving.worker.Extension",
        enforce_eager=not torch.cuda.is_available(),
        disable_log_stats=True,
        tensor_parallel_size=ranks,
        load_format="auto" if any(directory.glob("*.safetensors")) else "dummy",
    )
    limits = llm.collective_rpc("max_served_tokens")
    if kernel_tokens is not None and limits != [kernel_tokens] * ranks:
        raise RuntimeError(f"the workers take the kernel for up to {limits} tokens, not {kernel_tokens}")
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(1)

    def times(sequences: int, length: int, tokens: int) -> list[float]:
        return step_times(llm, torch.randint(0, vocabulary, (sequences, length), generator=generator).tolist(), tokens)

    pipe.send((version, time.perf_counter() - started))
    while (order := pipe.recv()) is not None:
        if order[0] == "set":
            pipe.send(set_sparsity(llm, order[1]))
            continue
        phase, sequences = order
        if phase == "decode":
            pipe.send(window_median(times(sequences, PROMPT, OUTPUT)))
        else:
            pipe.send(statistics.median(times(sequences, FIRST_TOKEN_PROMPT, 1)[-1] for _ in range(FIRST_TOKENS)))


def step_times(llm: LLM, prompts: list[list[int]], tokens: int) -> list[float]:
    """Seconds from the first request to the end of each step of the engine, until all prompts have their tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.FINAL_ONLY  # what LLM.generate asks for
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=kind)
    engine, times, began = llm.llm_engine, [], time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{began}-{number}", {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        engine.step()
        times.append(time.perf_counter() - began)
    return times


def window_median(times: list[float]) -> float:
    """Seconds a step, from when each of them ended."""
    return statistics.median(b - a for a, b in zip(times, times[WINDOW:], strict=False)) / WINDOW


class Engine:
    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, *arguments))
        self.process.start()
        other.close()  # so that a process that dies ends recv() with EOFError
        self.sparsity: float | None = None
        self.warm: set[tuple[str, int]] = set()

    def ask(self, *order: Any) -> Any:
        self.pipe.send(order)
        return self.pipe.recv()

    def set(self, sparsity: float) -> None:
        if self.sparsity != sparsity:
            self.ask("set", sparsity)
            self.sparsity = sparsity

    def time(self, phase: str, sequences: int) -> float:
        """Seconds of a step ("decode") or to the first token ("first_token"). A first call of its kind comes before."""
        if (phase, sequences) not in self.warm:
            self.ask(phase, sequences)
            self.warm.add((phase, sequences))
        return self.ask(phase, sequences)

    def end(self) -> None:
        try:
            self.pipe.send(None)
            self.process.join(20)
        except OSError:  # it has died
            pass
        self.process.kill()


def timed_in_turns(
    engines: dict[str, Engine], phase: str, sequences: int, repetitions: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The median of each engine's times, taken in turns, and of the dense engine's to it within a turn."""
    order = list(engines.items())
    turns = [
        {name: engine.time(phase, sequences) for name, engine in order[:: -1 if turn % 2 else 1]}
        for turn in range(repetitions)
    ]
    times = {name: statistics.median(turn[name] for turn in turns) for name in engines}
    return times, {name: statistics.median(turn["dense"] / turn[name] for turn in turns) for name in engines}


def main() -> None:
    parser = command(__spec__, __doc__, "CSV file of the results")
    parser.add_argument("--model", choices=CONFIGS, default="mistral-7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.9, 0.0])
    parser.add_argument("--kernel-tokens", type=int, default=8, help="of the third engine; 0 leaves it out")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs of each engine")
    parser.add_argument("--awq", action="store_true", help="vLLM's own int4 beside them")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=220, help="no measurement begins later than this")
    arguments = parser.parse_args()
    places = [place for place in ("/dev/shm", tempfile.gettempdir()) if Path(place).is_dir()]
    with tempfile.TemporaryDirectory(dir=max(places, key=lambda place: shutil.disk_usage(place).free)) as directory:
        run(arguments, Path(directory))


def run(arguments: argparse.Namespace, directory: Path) -> None:
    began = time.perf_counter()
    device = str(machine.default_device())
    file = ResultFile(arguments.output, machine.facts(device, arguments.commit), digits=4)
    # In a process of its own, so that the weights leave the GPU.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        paths = pool.apply(make_checkpoints, (arguments.model, arguments.layers, directory, device))
    print(f"checkpoints after {time.perf_counter() - began:.0f} s", flush=True)
    engines = {}
    try:
        limits: dict[str, int | None] = {"dense": None, "sparse": None}
        if arguments.kernel_tokens:
            limits["kernel"] = arguments.kernel_tokens
        if arguments.awq:
            limits["awq"], paths["awq"] = None, describe_awq(paths["dense"], directory / "awq")
        for name, limit in limits.items():
            path, ranks = paths.get(name, paths["sparse"]), arguments.tensor_parallel
            cache = directory / f"cache-{name}"  # one each: the limit is a constant of the compiled graph
            engines[name] = Engine(path, arguments.sizes, limit, ranks, cache)
        for name, engine in list(engines.items()):
            try:
                version, seconds = engine.pipe.recv()
                print(f"{name}: vLLM {version} started in {seconds:.0f} s", flush=True)
            except EOFError:
                if name == "dense":
                    raise RuntimeError("the dense engine did not start") from None
                print(f"{name}: did not start, left out", flush=True)
                del engines[name]
        print(f"engines after {time.perf_counter() - began:.0f} s", flush=True)
        common = {"model": arguments.model, "layers": arguments.layers or "all", "vllm": version}
        common["tensor_parallel"] = arguments.tensor_parallel
        for sparsity in arguments.sparsities:
            measure(arguments, engines, sparsity, common, file, began)
            if awq := engines.pop("awq", None):  # it has no sparsity
                awq.end()
    finally:
        for engine in engines.values():
            engine.end()


def measure(
    arguments: argparse.Namespace,
    engines: dict[str, Engine],
    sparsity: float,
    common: dict[str, Any],
    file: ResultFile,
    began: float,
) -> None:
    """Rows of all sizes at one sparsity, and of the first token."""
    for name in engines.keys() - {"dense", "awq"}:
        engines[name].set(sparsity)

    def add(phase: str, sequences: int, engines: dict[str, Engine], repetitions: int) -> None:
        times, speedups = timed_in_turns(engines, phase, sequences, repetitions)
        row = common | {"phase": phase, "sparsity": sparsity, "sequences": sequences}
        row |= {f"{name}_ms": value * 1e3 for name, value in times.items()}
        row |= {f"{name}_speedup": speedups[name] for name in times.keys() - {"dense"}}
        print(*(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()))
        missing = {f"{name}_{key}": "" for name in ("kernel", "awq") for key in ("ms", "speedup")}
        file.add(missing | row)

    first = sparsity == arguments.sparsities[0]
    for sequences in arguments.sizes:
        if not first and sequences > max(arguments.kernel_tokens, MAX_SERVED_TOKENS):
            continue
        if time.perf_counter() - began > arguments.seconds:
            print("out of time", flush=True)
            return
        few = sequences <= arguments.kernel_tokens
        timed = {name: engine for name, engine in engines.items() if name != "kernel" or few}
        add("decode", sequences, timed, arguments.repetitions)
    if not first:
        return
    timed = {name: engine for name, engine in engines.items() if name != "kernel"}
    add("first_token", 1, timed, FIRST_TOKEN_TURNS * arguments.repetitions)


if __name__ == "__main__":
    main()
