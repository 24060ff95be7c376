"""The model card of an exported checkpoint: `README.md` of a Hugging Face directory."""

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from pg_ground.checkpoints import run_directory
from pg_ground.checkpoints.run_directory import RunCheckpoint
from pg_ground.reporting.report import RESULTS_NOTE, evaluations_by_step
from pg_ground.reporting.run_files import Run, read_run
from pg_ground.reporting.tables import Table, cell_text, is_shown, results_table
from pg_ground.storage.downloads import FILE_ENDINGS, HUB_NAME
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonObject

FILE = "README.md"

USE = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "{folder}"  # {folder_note}
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
image = Image.open("photo.jpg").convert("RGB")
inputs = processor(images=image, text="<image>{prompt}", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
answer = tokens[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
```

The processor writes `<image>` tokens, BOS and the newline behind the prompt. Pass its
`token_type_ids` to `generate`: they give the prompt its full attention.

A box is written as four tokens `<locNNNN>`: y1, x1, y2, x2. A point is written as two: y, x. Each
is a fraction of the image's height or width, in 1023rds. This reads boxes in pixels:

```python
import re

text = "{example}"
width, height = 640, 480
for y1, x1, y2, x2, name in re.findall(r"{pattern}", text):
    y1, x1, y2, x2 = (int(number) / 1023 for number in (y1, x1, y2, x2))
    print(name.strip(), [x1 * width, y1 * height, x2 * width, y2 * height])
```
"""

PATTERN = r"<loc(\d{4})>" * 4 + r"([^;<]*)"

EXAMPLE = "<loc0100><loc0200><loc0500><loc0800> cat"

PUBLIC_SCHEMES = ("synthetic", "tfds")
"""Schemes whose names of data are no names of files."""


def model_card(checkpoint: FilePath, repo: str = "", origin: str = "", name: str = "") -> str:
    """Returns the card of a checkpoint as Markdown, with the metadata that the Hub reads.

    The card of a run has its stages, its rewards, the kinds of its data and its held-out metrics.
    Paths of this machine are not in it. The card of another checkpoint says only what is known.

    Args:
      checkpoint: a run, one of its checkpoints, or another checkpoint.
      repo: ORG/NAME of the model on the Hub; "" for a folder.
      origin: the name by which the user called the checkpoint, which can be a name on the Hub.
      name: the name of the folder, if `repo` is "".
    """
    exported = _run_checkpoint(checkpoint)
    run = read_run(exported.workdir) if exported else None
    name = repo.rpartition("/")[2] or name or "PaliGemma"
    base = _hub_name(str(run.config.get("init", ""))) if run else _hub_name(origin)
    results = _eval_results(exported) if exported else {}
    parts = [
        f"---\n{yaml.safe_dump(_metadata(name, base, run, results), sort_keys=False)}---",
        f"# {name}",
        "This PaliGemma finds objects in images. It answers a phrase such as `detect cat` with "
        "boxes or points.",
    ]
    prompt = "detect cat"
    if run and exported:
        step = int(exported.folder.name)
        parts += ["## Training", *_training(run, step)]
        parts += ["## Data", *_data(run)]
        parts += _result_sections(run, step, results)
        prompt = _prompt(run) or prompt
    else:
        parts += ["How these weights were trained is not known to the program that exported them."]
    folder = repo or "."
    note = "or the folder of a copy" if repo else "this folder, or ORG/NAME on the Hub"
    use = USE.format(
        folder=folder, folder_note=note, prompt=prompt, example=EXAMPLE, pattern=PATTERN
    )
    return "\n\n".join([*parts, "## Use", use, "## Licence", _licence(base), _versions(run)])


def _metadata(
    name: str, base: str, run: Run | None, results: Mapping[str, JsonObject]
) -> dict[str, object]:
    """Returns the YAML at the top of a card."""
    metadata: dict[str, object] = {
        "license": "gemma",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["paligemma", "grounding", "pg_ground"],
    }
    if base:
        metadata["base_model"] = base
    datasets = sorted(_hub_datasets(run)) if run else []
    if datasets:
        metadata["datasets"] = datasets
    index = [
        {
            "task": {"type": "image-text-to-text"},
            "dataset": {"name": source, "type": source},
            "metrics": [
                {"type": metric, "name": metric, "value": value} for metric, value in values.items()
            ],
        }
        for source, values in results.items()
    ]
    if index:
        metadata["model-index"] = [{"name": name, "results": index}]
    return metadata


def _eval_results(exported: RunCheckpoint) -> dict[str, dict[str, float]]:
    """Returns the metrics of `eval.json` by source and name.

    `evaluate --workdir=RUN` writes the file for the newest checkpoint. Another checkpoint has none.
    """
    path = exported.workdir / "eval.json"
    if not path.is_file() or run_directory.newest(exported.workdir) != exported.folder:
        return {}
    results: dict[str, dict[str, float]] = {}
    for name, value in run_directory.read_json(path).items():
        if name.startswith("eval/") and is_shown(name) and isinstance(value, int | float):
            _, source, metric = name.split("/", 2)
            results.setdefault(source, {})[metric] = float(value)
    return results


def _result_sections(
    run: Run, step: int, results: Mapping[str, Mapping[str, float]]
) -> Sequence[str]:
    """Returns the tables of held-out metrics: of `eval.json`, and during training."""
    sections = []
    if results:
        rows = [
            [source, metric, f"{value:.3f}"]
            for source, values in results.items()
            for metric, value in values.items()
        ]
        title = "Metrics of the evaluation"
        sections.append(_markdown(Table(title, ["source", "metric", "value"], rows)))
    table = _results(run, step)
    if table.rows:
        sections.append(_markdown(table))
    return ["## Results", *sections] if sections else []


def _data(run: Run) -> Sequence[str]:
    """Returns a list of the sources of each stage: name, kind, prompt and form of the answers."""
    lines = []
    for stage, _ in run.stages:
        for name, source in run.config[stage].get("sources", {}).items():
            details = [_public_uri(str(source["uri"])), f"prompt `{_last_name(source['prompt'])}`"]
            details += [f"answers of {source['target']}"]
            lines.append(f"- **{stage}/{name}**: {', '.join(details)}")
    sizes = f"Images have {run.config['model']['image_size']} × {run.config['model']['image_size']}"
    return ["\n".join(lines), f"{sizes} pixels."] if lines else [f"{sizes} pixels."]


def _public_uri(uri: str) -> str:
    """Returns the part of a uri that is no path of a machine: the scheme, and a public name."""
    scheme, _, location = uri.partition(":")
    location = location.partition("?")[0]
    of_hub = scheme == "hf" and all(map(_dataset_name, location.split(",")))
    is_public = scheme in PUBLIC_SCHEMES or of_hub
    is_path = "\\" in location or location.startswith((".", "/", "~"))
    return f"{scheme}:{location}" if is_public and not is_path else f"{scheme} files"


def _hub_datasets(run: Run) -> set[str]:
    """Returns ORG/NAME of the Hub's datasets on which a run was trained."""
    uris = [
        str(source["uri"])
        for stage, _ in run.stages
        for source in run.config[stage].get("sources", {}).values()
    ]
    locations = [uri.removeprefix("hf:").partition("?")[0] for uri in uris if uri.startswith("hf:")]
    names = {_dataset_name(item) for location in locations for item in location.split(",")}
    return names - {""}


def _dataset_name(item: str) -> str:
    """Returns ORG/NAME of one dataset of `hf:A,B@SPLIT`, "" if it is a path."""
    return _hub_name(item.strip().partition("@")[0])


def _prompt(run: Run) -> str:
    """Returns a prompt as the last stage writes it; "" if its template has further fields."""
    stage = run.stages[-1][0]
    for source in run.config[stage].get("sources", {}).values():
        prompt = str(source["prompt"]).replace("{phrase}", "cat")
        if not re.search(r'[{}"\\\n]|\.jinja$', prompt):
            return prompt
    return ""


def _licence(base: str) -> str:
    text = "The licence is the licence of the base model: Google's Gemma terms of use"
    address = "https://ai.google.dev/gemma/terms"
    return f"{text} ({address})." + (f" The base model is {base}." if base else "")


def _versions(run: Run | None) -> str:
    """Returns a sentence with the versions that trained and exported a model."""
    version = importlib.import_module("pg_ground").__version__
    text = f"Exported by pg_ground {version}."
    if not run or not run.machines:
        return text
    machine = run.machines[-1]
    names = [f"{name} {machine[name]}" for name in ("jax", "python") if machine.get(name)]
    devices = f" on {machine['devices']}" if machine.get("devices") else ""
    return f"{text} Trained with {', '.join(names)}{devices}."


def _run_checkpoint(checkpoint: FilePath) -> RunCheckpoint | None:
    """Returns the run and the step of a checkpoint, None if it belongs to no run."""
    folders = (checkpoint, *list(checkpoint.parents)[:3])
    is_of_run = any(run_directory.is_run(folder) for folder in folders)
    return run_directory.find_checkpoint(checkpoint) if is_of_run else None


def _hub_name(name: str) -> str:
    """Returns ORG/NAME of a model or a dataset on the Hub, "" if `name` is a path or is none."""
    match = HUB_NAME.fullmatch(name)
    is_path = name.startswith((".", "~")) or "/." in name
    is_local = is_path or name.endswith(FILE_ENDINGS) or (bool(name) and Path(name).exists())
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
