"""The model card of an exported run: `README.md` of a model on the Hugging Face Hub."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from pg_ground.checkpoints import run_directory
from pg_ground.checkpoints.run_directory import RunCheckpoint
from pg_ground.reporting.report import RESULTS_NOTE, evaluations_by_step
from pg_ground.reporting.run_files import Run, read_run
from pg_ground.reporting.tables import Table, cell_text, results_table
from pg_ground.storage.downloads import FILE_ENDINGS, HUB_NAME
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonObject

FILE = "README.md"

USE = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{repo}")
model = AutoModelForImageTextToText.from_pretrained("{repo}")
image = Image.open("photo.jpg").convert("RGB")
inputs = processor(images=image, text="<image>detect cat", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
answer = tokens[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=False))
```

A box is written as four tokens `<locNNNN>`: y1, x1, y2, x2, in 1024ths of the image's height and
width. A point is written as two: y, x.
"""


def model_card(checkpoint: FilePath, repo: str) -> str:
    """Returns the card of a checkpoint as Markdown, with the metadata that the Hub reads.

    The card of a run has its stages, its rewards and its held-out metrics. Paths of the run's data
    are not in it.

    Args:
      checkpoint: a run, one of its checkpoints, or another checkpoint.
      repo: ORG/NAME of the model on the Hub.
    """
    exported = _run_checkpoint(checkpoint)
    run = read_run(exported.workdir) if exported else None
    base = _base_model(str(run.config.get("init", ""))) if run else ""
    metadata: dict[str, object] = {
        "license": "gemma",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["paligemma", "grounding", "pg_ground"],
    }
    if base:
        metadata["base_model"] = base
    name = repo.rpartition("/")[2]
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {name}",
        "This PaliGemma finds objects in images. It answers a phrase such as `detect cat` with "
        "boxes or points.",
    ]
    if run and exported:
        step = int(exported.folder.name)
        parts += ["## Training", *_training(run, step)]
        table = _results(run, step)
        if table.rows:
            parts += ["## Results", _markdown(table)]
    parts += ["## Use", USE.format(repo=repo)]
    return "\n\n".join(parts)


def _run_checkpoint(checkpoint: FilePath) -> RunCheckpoint | None:
    """Returns the run and the step of a checkpoint, None if it belongs to no run."""
    folders = (checkpoint, *list(checkpoint.parents)[:3])
    is_of_run = any(run_directory.is_run(folder) for folder in folders)
    return run_directory.find_checkpoint(checkpoint) if is_of_run else None


def _base_model(init: str) -> str:
    """Returns ORG/NAME of the model on the Hub that a run started from, "" if it is not known."""
    match = HUB_NAME.fullmatch(init)
    is_local = init.endswith(FILE_ENDINGS) or Path(init).exists()
    return "" if match is None or is_local else match["repo"]


def _results(run: Run, step: int) -> Table:
    """Returns the held-out metrics before training and of the exported step."""
    columns = {
        "before training" if measured == 0 else f"step {measured}": values
        for measured, values in evaluations_by_step(run).items()
        if measured in (0, step)
    }
    return results_table("Held-out metrics", columns, RESULTS_NOTE)


def _training(run: Run, step: int) -> Sequence[str]:
    """Returns paragraphs about the stages of a run and the exported step."""
    lines = []
    for stage, steps in run.stages:
        settings = run.config[stage]
        details = [f"batch size {settings['batch_size']}"]
        details += [f"learning rate {settings['optimizer']['lr']:g}"]
        if "group_size" in settings:
            details += [f"{settings['group_size']} completions of each prompt"]
            details += [
                f"algorithm `{_last_name(settings['algorithm'])}`",
                f"rewards {_rewards(settings)}",
            ]
        lines.append(f"- **{stage}**, {steps:,} steps: {', '.join(details)}")
    rank = run.config["model"]["lora"]["rank"]
    adapters = f" LoRA adapters of rank {rank} were trained and then merged." if rank else ""
    commits = [machine.get("commit") for machine in run.machines]
    commit = f" (commit {commits[-1]})" if commits and commits[-1] else ""
    total = sum(steps for _, steps in run.stages)
    text = f"It was trained with pg_ground{commit}. These are the weights of step {step:,} of "
    return [f"{text}{total:,}.{adapters}", "\n".join(lines)]


def _last_name(name: str) -> str:
    """Returns the name of a user's file without its folder."""
    return name.rpartition("/")[2]


def _rewards(settings: JsonObject) -> str:
    weights = {**settings["rewards"], **settings.get("text_rewards", {})}
    names = [f"{_last_name(name)} × {weight}" for name, weight in weights.items()]
    return ", ".join(names) or "none"


def _markdown(table: Table) -> str:
    """Returns a table in Markdown, with its note below."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = [f"| {' | '.join(map(cell_text, row))} |" for row in rows]
    return "\n".join(lines) + (f"\n\n{table.note}" if table.note else "")
