"""Our GRPO step beside what users would run instead, on equal work: one table of ratios.

python benchmarks/versus.py [--size=tiny|small|3b_224|3b_448] [--peers=ours,hand,trl,…] [--rounds=5] [--threads=1]
    [--device=cpu|cuda] [--dtype=float32|bfloat16] [--checkpointing=true|false] [--prompts=N --group=N --tokens=N]
    [--grad_accum_steps=1] [--python=PEERS_PYTHON] [--big_vision=CLONE] [--json=O] [--out=O.md]

Peers: ours; hand, the loop a torch user writes (Hugging Face's generate with its cache, then TRL's loss); trl, TRL's GRPOTrainer;
generate_dynamic, generate_static and generate_compiled, sampling alone; big_vision, a step of its model, its decode loop and its
trainer's loss, and big_vision_decode, that loop alone. A peer that is not installed is said to be so and left out:

    pip install 'pg-ground[peers]'    (torch 2.13.0, transformers 5.23.0, trl 1.16.0)
    git clone https://github.com/google-research/big_vision; git -C big_vision checkout 0127fb6; pip install tensorflow
                                      (which it imports; then --big_vision=big_vision)

Equal work: an architecture of the same sizes with random float32 parameters, all trained by Adam with the gradient clipped; the
same numbers of prompts (an image and `prompt_tokens` tokens each), completions and tokens, none of which ends early; a KL to a
reference policy. Each peer is a process of its own and does one step in its turn, so that all of them see the machine in the same
state; the first step, which compiles, is not counted. On a GPU, where they do not fit beside one another, each is started afresh
in every round (`--together=false`).

What is timed: rollout, from prompts and pixels to tokens; score, rewards and the reference policy's pass; update, loss, gradient,
clip and Adam. Turning records into pixels and ids is not. CPU-seconds are those of all threads of a process; `--threads` cores
are given to each. What was done is checked: numbers of completions and tokens, equal numbers of parameters, that the gradient is
not zero and that parameters move.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from peers.work import SIZES, Work

from pg_ground import cli
from pg_ground.config import nearest
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.types import UserError

HERE = Path(__file__).parent / "peers"

PEERS: dict[str, tuple[str, str]] = {
    "ours": ("ours.py", ""),
    "hand": ("torch_peers.py", "hand"),
    "trl": ("torch_peers.py", "trl"),
    "generate_dynamic": ("torch_peers.py", "generate:dynamic"),
    "generate_static": ("torch_peers.py", "generate:static"),
    "generate_compiled": ("torch_peers.py", "generate:compiled"),
    "big_vision": ("big_vision_peer.py", ""),
    "big_vision_decode": ("big_vision_peer.py", "decode"),
}
"""Program and what it is to do."""

PHASES = ("rollout", "score", "update")


class Peer:
    """A running program that does a step when asked to."""

    def __init__(self, name: str, w: Work, python: str, log: Path):
        program, variant = PEERS[name]
        threads = {key: str(w.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        offline = {
            key: "1" for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        }
        platform = (
            {"JAX_PLATFORMS": w.device}
            if w.device == "cpu"
            else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        )
        self._process = subprocess.Popen(
            [python, str(HERE / program), json.dumps(w._replace(variant=variant)._asdict())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            env={**os.environ, **threads, **offline, **platform})  # fmt: skip
        self.log = log
        self.facts = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            said = self.log.read_text().strip().splitlines()
            raise UserError(said[-1][:300] if said else "the process ended without a word")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Result(NamedTuple):
    """What a peer was measured to do, step by step."""

    facts: dict[str, Any]
    warm_up: dict[str, Any]
    steps: list[dict[str, Any]]

    def median(self, clock: str, phase: str) -> float | None:
        """Returns seconds (by `seconds` or `cpu_seconds`) of a phase, or of all three as `step`; None if it has no such phase."""
        phases = PHASES if phase == "step" else (phase,)
        if any(name not in step[clock] for step in self.steps for name in phases):
            return None
        return statistics.median(sum(step[clock][name] for name in phases) for step in self.steps)

    def spread(self, clock: str) -> float:
        """Returns (largest - smallest) / median of the steps' sums."""
        sums = [sum(step[clock].get(name, 0.0) for name in PHASES) for step in self.steps]
        return (max(sums) - min(sums)) / statistics.median(sums)


def measure(
    names: Sequence[str], w: Work, rounds: int, together: bool, python: str, logs: Path
) -> dict[str, Result | str]:
    """Returns what each peer did, or why it could not."""
    found: dict[str, Result | str] = {}
    running: dict[str, Peer] = {}
    for turn in range(rounds):
        for name in names:
            if isinstance(found.get(name), str):
                continue
            try:
                if name not in running:
                    running[name] = Peer(name, w, python, logs / f"{name}.log")
                    warm_up = running[name].step()
                    found.setdefault(name, Result(running[name].facts, warm_up, []))
                result = found[name]
                assert isinstance(result, Result)
                step = running[name].step()
                check(name, w, step["checks"])
                result.steps.append(step)
                print(
                    f"round {turn + 1}: {name} {sum(step['cpu_seconds'].values()):.2f} CPU s",
                    file=sys.stderr,
                    flush=True,
                )
                if not together:
                    running.pop(name).end()
            except UserError as error:
                found[name] = str(error)
                running.pop(name, None)
    for peer in running.values():
        peer.end()
    return found


def check(name: str, w: Work, checks: dict[str, float]) -> None:
    """Raises UserError where a peer has not done the work."""
    if (checks["turns"], checks["completions"]) != (w.tokens, w.rows):
        raise UserError(
            f"{name} made {checks['completions']} completions of {checks['turns']} tokens, not {w.rows} of {w.tokens}"
        )
    if not checks.get("moved", 1.0) or checks.get("grad_norm") == 0:
        raise UserError(f"{name} did not move its parameters: {checks}")


def tables(found: dict[str, Result | str], w: Work) -> list[Table]:
    """Returns CPU seconds and wall seconds a step, each with its ratio to ours."""
    measured = {name: result for name, result in found.items() if isinstance(result, Result)}
    out: list[Table] = []
    for clock, label in (
        (("cpu_seconds", "CPU seconds"), ("seconds", "seconds")) if measured else ()
    ):
        heads = [
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
        rows = []
        for name, result in measured.items():
            values = {phase: result.median(clock, phase) for phase in (*PHASES, "step")}
            ours = (
                {p: measured["ours"].median(clock, p) for p in ("rollout", "step")}
                if "ours" in measured
                else {}
            )
            ratios = [_ratio(values[phase], ours.get(phase)) for phase in ("rollout", "step")]
            sampled = w.rows * w.tokens / (values["rollout"] or 1.0)
            peak = max(step["peak_bytes"] for step in result.steps) / 2**30
            cells = [f"{v:.3g}" if v is not None else "" for v in values.values()]
            rows.append(
                [
                    name,
                    *cells,
                    *ratios,
                    f"{result.spread(clock):.0%}",
                    f"{sampled:.0f}",
                    f"{peak:.2f}",
                ]
            )
        out.append(
            Table(
                f"{label} a step, median of {max(len(r.steps) for r in measured.values())}",
                heads,
                rows,
                "",
            )
        )
    return out


def _ratio(theirs: float | None, ours: float | None) -> str:
    return f"{theirs / ours:.1f}x" if theirs is not None and ours else ""


def markdown(found: dict[str, Result | str], w: Work, argv: Sequence[str]) -> str:
    """Returns the result as a section of a page."""
    lines = [
        f"## {w.size}: {w.of.image} px, {w.of.image_tokens} + {w.prompt_tokens} prefix tokens, {w.prompts} prompts x {w.group} x "
        f"{w.tokens} tokens, {w.dtype}, {w.device}, {w.threads} thread{'s' * (w.threads > 1)}",
        "",
        f"{date.today()}, commit {commit()}: `python benchmarks/versus.py {' '.join(argv)}`",
    ]
    for table in tables(found, w):
        lines += [
            "",
            table.title + ":",
            "",
            "| " + " | ".join(table.columns) + " |",
            "|---" * len(table.columns) + "|",
        ]
        lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    lines.append("")
    for name, result in found.items():
        if isinstance(result, str):
            lines.append(f"- {name}: {result}")
        else:
            said = ", ".join(f"{k} {v}" for k, v in result.facts["versions"].items())
            lines.append(f"- {name}: {result.facts['parameters']:,} parameters; {said}")
    return "\n".join(lines) + "\n"


def commit() -> str:
    """Returns the commit that is checked out, and whether files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        " and changes" if git("status", "--porcelain", "-uno") else ""
    )


FLAGS = {
    "size": "tiny", "peers": ",".join(PEERS), "rounds": 5, "threads": 1, "device": "cpu", "dtype": "", "checkpointing": "true",
    "prompts": 0, "group": 0, "tokens": 0, "prompt_tokens": 16, "grad_accum_steps": 1, "python": sys.executable,
    "big_vision": "", "together": "", "logs": "", "json": "", "out": ""}  # fmt: skip


def main(argv: Sequence[str]) -> None:
    own = cli.parse_script_flags(argv, FLAGS)
    for flag, names in (("size", [own["size"]]), ("peers", own["peers"].split(","))):
        for name in names:
            if name not in (there := SIZES if flag == "size" else PEERS):
                raise UserError(f"--{flag}={name} does not exist: {nearest(name, there)}")
    size, cpu = SIZES[own["size"]], own["device"] == "cpu"
    w = Work(
        size=own["size"],
        prompts=own["prompts"] or size.prompts,
        group=own["group"] or size.group,
        tokens=own["tokens"] or size.tokens,
        prompt_tokens=own["prompt_tokens"],
        dtype=own["dtype"] or ("float32" if cpu else "bfloat16"),
        checkpointing=own["checkpointing"] == "true",
        device=own["device"],
        threads=own["threads"],
        grad_accum_steps=own["grad_accum_steps"],
        variant="",
    )
    if cpu:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-w.threads :])
    if own["big_vision"]:
        paths = [str(Path(own["big_vision"]).resolve()), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    logs = Path(own["logs"] or "/tmp") / f"versus-{os.getpid()}"
    logs.mkdir(parents=True)
    together = own["together"] == "true" or (not own["together"] and cpu)
    found = measure(own["peers"].split(","), w, own["rounds"], together, own["python"], logs)
    for name, result in found.items():
        if isinstance(result, str):
            print(f"{name}: {result} ({logs / name}.log)")
    for table in tables(found, w):
        print(ascii_table(table))
    counts = {result.facts["parameters"] for result in found.values() if isinstance(result, Result)}
    if len(counts) > 1:
        raise UserError(f"the peers have {counts} parameters: they are not the same model")
    if own["out"]:
        with open(own["out"], "a") as file:
            file.write(markdown(found, w, argv) + "\n")
    if own["json"]:
        everything = {
            name: result._asdict() if isinstance(result, Result) else result
            for name, result in found.items()
        }
        Path(own["json"]).write_text(
            json.dumps({"work": w._asdict(), "commit": commit(), "peers": everything}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    cli.run_script(main)
