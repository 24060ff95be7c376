"""Compares our GRPO step with the steps that users would run instead, on equal work.

python benchmarks/versus.py [--size=tiny|small|3b_224|3b_448] [--peers=ours,hand,trl,…] [--rounds=5]
    [--threads=1] [--device=cpu|cuda] [--dtype=float32|bfloat16] [--checkpointing=true|false]
    [--prompts=N] [--group=N] [--tokens=N] [--prompt_tokens=16] [--grad_accum_steps=1]
    [--python=PEERS_PYTHON] [--big_vision=CLONE] [--together=true|false] [--logs=FOLDER]
    [--json=O] [--out=O.md]

Peers:
- ours
- hand: a loop of a torch user, with Hugging Face's generate and its cache, then TRL's loss
- trl: TRL's GRPOTrainer
- generate_dynamic, generate_static, generate_compiled: sampling alone
- big_vision: a step of its model, its decode loop and its trainer's loss
- big_vision_decode: that decode loop alone

A peer that is not installed is reported and left out:

    pip install -e '.[peers]'    (torch 2.13.0, transformers 5.23.0, trl 1.16.0)
    git clone https://github.com/google-research/big_vision
    git -C big_vision checkout 0127fb6; pip install tensorflow    (which big_vision imports)
    and then --big_vision=big_vision

Equal work: an architecture of the same sizes with random float32 parameters. Adam trains all of
them, with the gradient clipped. The numbers of prompts (an image and `prompt_tokens` tokens each),
completions and tokens are the same, and no completion ends early. There is a KL to a reference
policy. Each peer is a process of its own, and the peers do one step in turn, so that all of them
see the machine in the same state. The first step compiles and is not counted. On a GPU the peers
may not fit beside one another: there each peer is started again in every round
(`--together=false`).

Three phases are timed: rollout (from prompts and pixels to tokens), score (rewards and the
reference policy's pass) and update (loss, gradient, clip and Adam). Turning records into pixels and
ids is not timed. CPU seconds are the seconds of all threads of a process; each process gets
`--threads` cores. The work is checked: the numbers of completions, tokens and parameters are equal,
the gradient is not zero, and parameters change.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from peers.work import SIZES, Work

from pg_ground import cli
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.types import UserError, nearest

PROGRAMS = Path(__file__).parent / "peers"

PEERS: dict[str, tuple[str, str]] = {
    "ours": ("ours.py", ""),
    "hand": ("torch_peers.py", "hand"),
    "trl": ("trl_peer.py", ""),
    "generate_dynamic": ("torch_peers.py", "generate:dynamic"),
    "generate_static": ("torch_peers.py", "generate:static"),
    "generate_compiled": ("torch_peers.py", "generate:compiled"),
    "big_vision": ("big_vision_peer.py", ""),
    "big_vision_decode": ("big_vision_peer.py", "decode"),
}
"""The program of each peer, and its variant."""

PHASES = ("rollout", "score", "update")

COLUMNS = [
    "peer",
    "rollout",
    "score",
    "update",
    "step",
    "rollout / ours",
    "step / ours",
    "spread",
    "tokens/s",
    "peak GiB",
]

FLAGS = {
    "size": "tiny",
    "peers": ",".join(PEERS),
    "rounds": 5,
    "threads": 1,
    "device": "cpu",
    "dtype": "",
    "checkpointing": "true",
    "prompts": 0,
    "group": 0,
    "tokens": 0,
    "prompt_tokens": 16,
    "grad_accum_steps": 1,
    "python": sys.executable,
    "big_vision": "",
    "together": "",
    "logs": "",
    "json": "",
    "out": "",
}


class Peer:
    """A running peer program."""

    def __init__(self, name: str, work: Work, python: str, log: Path):
        program, variant = PEERS[name]
        self._process = subprocess.Popen(
            [
                python,
                str(PROGRAMS / program),
                json.dumps(work._replace(variant=variant)._asdict()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=peer_environment(work),
        )
        self._log = log
        self.facts = self._read()

    def _read(self) -> dict[str, Any]:
        """Returns the next message of the program.

        Raises:
          UserError: the program ended; the text is the last line of its log.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            log = self._log.read_text().strip().splitlines()
            raise UserError(log[-1][:300] if log else "the process ended without a message")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        """Requests a step and returns its measurements."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        """Ends the program."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def peer_environment(work: Work) -> dict[str, str]:
    """Returns the environment of a peer: its threads, and no downloads."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(work.threads),
        "MKL_NUM_THREADS": str(work.threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    if work.device == "cpu":
        return environment | {"JAX_PLATFORMS": "cpu"}
    return environment | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Result(NamedTuple):
    """The measurements of a peer."""

    facts: dict[str, Any]
    warm_up: dict[str, Any]
    steps: list[dict[str, Any]]

    def median(self, clock: str, phase: str) -> float | None:
        """Returns the median time of a phase. None means that the peer does not have the phase.

        Args:
          clock: "seconds" or "cpu_seconds".
          phase: one of `PHASES`, or "step" for all of them.
        """
        phases = PHASES if phase == "step" else (phase,)
        if any(name not in step[clock] for step in self.steps for name in phases):
            return None
        return statistics.median(sum(step[clock][name] for name in phases) for step in self.steps)

    def spread(self, clock: str) -> float:
        """Returns (largest - smallest) / median of the step times."""
        times = [sum(step[clock].get(name, 0.0) for name in PHASES) for step in self.steps]
        return (max(times) - min(times)) / statistics.median(times)

    @property
    def peak_gib(self) -> float:
        """Peak memory of all steps."""
        return max(step["peak_bytes"] for step in self.steps) / 2**30


def measure(
    names: Sequence[str], work: Work, rounds: int, together: bool, python: str, logs: Path
) -> dict[str, Result | str]:
    """Returns the result of each peer, or the reason why it has none."""
    results: dict[str, Result | str] = {}
    running: dict[str, Peer] = {}
    for number in range(rounds):
        for name in names:
            if isinstance(results.get(name), str):
                continue
            try:
                if name not in running:
                    peer = running[name] = Peer(name, work, python, logs / f"{name}.log")
                    results.setdefault(name, Result(peer.facts, peer.step(), []))
                step = running[name].step()
                check_work(name, work, step["checks"])
            except UserError as error:
                results[name] = str(error)
                running.pop(name, None)
                continue
            result = results[name]
            assert isinstance(result, Result)
            result.steps.append(step)
            cpu_s = sum(step["cpu_seconds"].values())
            print(f"round {number + 1}: {name} {cpu_s:.2f} CPU s", file=sys.stderr, flush=True)
            if not together:
                running.pop(name).end()
    for peer in running.values():
        peer.end()
    return results


def check_work(name: str, work: Work, checks: dict[str, float]) -> None:
    """Raises UserError if a peer has not done the work."""
    if (checks["decode_steps"], checks["completions"]) != (work.tokens, work.completions):
        raise UserError(
            f"{name} made {checks['completions']} completions of {checks['decode_steps']} tokens, "
            f"not {work.completions} of {work.tokens}"
        )
    if not checks.get("parameter_change", 1.0) or checks.get("grad_norm") == 0:
        raise UserError(f"{name} did not change its parameters: {checks}")


def result_tables(results: Mapping[str, Result | str], work: Work) -> list[Table]:
    """Returns CPU seconds and wall seconds per step, each with its ratio to ours."""
    measured = {name: result for name, result in results.items() if isinstance(result, Result)}
    if not measured:
        return []
    rounds = max(len(result.steps) for result in measured.values())
    return [
        Table(
            f"{label} a step, median of {rounds}",
            COLUMNS,
            [table_row(name, measured, work, clock) for name in measured],
            "",
        )
        for clock, label in (("cpu_seconds", "CPU seconds"), ("seconds", "seconds"))
    ]


def table_row(name: str, results: Mapping[str, Result], work: Work, clock: str) -> list[str]:
    """Returns the cells of one peer."""
    result = results[name]
    ours = results.get("ours")
    times = {phase: result.median(clock, phase) for phase in (*PHASES, "step")}
    ratios = [
        ratio_text(times[phase], ours.median(clock, phase) if ours else None)
        for phase in ("rollout", "step")
    ]
    tokens_per_s = work.completions * work.tokens / (times["rollout"] or 1.0)
    return [
        name,
        *("" if seconds is None else f"{seconds:.3g}" for seconds in times.values()),
        *ratios,
        f"{result.spread(clock):.0%}",
        f"{tokens_per_s:.0f}",
        f"{result.peak_gib:.2f}",
    ]


def ratio_text(seconds: float | None, our_seconds: float | None) -> str:
    """Returns a ratio such as 7.7x, "" if one of the times is missing."""
    return f"{seconds / our_seconds:.1f}x" if seconds is not None and our_seconds else ""


def markdown(results: Mapping[str, Result | str], work: Work, argv: Sequence[str]) -> str:
    """Returns the results as a section of a Markdown page."""
    size = work.model_size
    plural = "s" if work.threads > 1 else ""
    lines = [
        f"## {work.size}: {size.image} px, {size.image_tokens} + {work.prompt_tokens} prefix "
        f"tokens, {work.prompts} prompts x {work.group} x {work.tokens} tokens, {work.dtype}, "
        f"{work.device}, {work.threads} thread{plural}",
        "",
        f"{date.today()}, commit {commit()}: `python benchmarks/versus.py {' '.join(argv)}`",
    ]
    for table in result_tables(results, work):
        lines += ["", f"{table.title}:", "", "| " + " | ".join(table.columns) + " |"]
        lines.append("|---" * len(table.columns) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    lines.append("")
    for name, result in results.items():
        if isinstance(result, str):
            lines.append(f"- {name}: {result}")
        else:
            packages = ", ".join(f"{k} {v}" for k, v in result.facts["versions"].items())
            lines.append(f"- {name}: {result.facts['parameters']:,} parameters; {packages}")
    return "\n".join(lines) + "\n"


def commit() -> str:
    """Returns the commit that is checked out, and whether files differ from it."""
    revision = _git("rev-parse", "--short", "HEAD")
    has_changes = _git("status", "--porcelain", "-uno")
    return f"{revision} and changes" if has_changes else revision


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    finished = subprocess.run(command, cwd=PROGRAMS, capture_output=True, text=True, check=False)
    return finished.stdout.strip()


def make_work(flags: Mapping[str, Any]) -> Work:
    """Returns the work that the flags describe.

    Raises:
      UserError: there is no such size or peer.
    """
    for flag, names, choices in (
        ("size", [flags["size"]], SIZES),
        ("peers", flags["peers"].split(","), PEERS),
    ):
        for name in names:
            if name not in choices:
                raise UserError(f"--{flag}={name} does not exist: {nearest(name, choices)}")
    size = SIZES[flags["size"]]
    default_dtype = "float32" if flags["device"] == "cpu" else "bfloat16"
    return Work(
        size=flags["size"],
        prompts=flags["prompts"] or size.prompts,
        group=flags["group"] or size.group,
        tokens=flags["tokens"] or size.tokens,
        prompt_tokens=flags["prompt_tokens"],
        dtype=flags["dtype"] or default_dtype,
        checkpointing=flags["checkpointing"] == "true",
        device=flags["device"],
        threads=flags["threads"],
        grad_accum_steps=flags["grad_accum_steps"],
        variant="",
    )


def main(argv: Sequence[str]) -> None:
    flags = cli.parse_script_flags(argv, FLAGS)
    work = make_work(flags)
    is_cpu = work.device == "cpu"
    if is_cpu:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-work.threads :])
    if flags["big_vision"]:
        paths = [str(Path(flags["big_vision"]).resolve()), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    logs = Path(flags["logs"] or "/tmp") / f"versus-{os.getpid()}"
    logs.mkdir(parents=True)
    together = flags["together"] == "true" or (not flags["together"] and is_cpu)
    peers = flags["peers"].split(",")
    results = measure(peers, work, flags["rounds"], together, flags["python"], logs)
    for name, result in results.items():
        if isinstance(result, str):
            print(f"{name}: {result} ({logs / name}.log)")
    for table in result_tables(results, work):
        print(ascii_table(table))
    measured = [result for result in results.values() if isinstance(result, Result)]
    counts = {result.facts["parameters"] for result in measured}
    if len(counts) > 1:
        raise UserError(f"the peers have {counts} parameters: they are not the same model")
    if flags["out"]:
        with open(flags["out"], "a") as file:
            file.write(markdown(results, work, argv) + "\n")
    if flags["json"]:
        document = {
            "work": work._asdict(),
            "commit": commit(),
            "peers": {
                name: result._asdict() if isinstance(result, Result) else result
                for name, result in results.items()
            },
        }
        Path(flags["json"]).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    cli.run_script(main)
