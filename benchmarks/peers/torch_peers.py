"""What a torch user would run: TRL's GRPOTrainer, a loop written by hand, or Hugging Face's generate alone.

`variant` is trl, hand, or generate with one of dynamic, static and compiled behind a colon.
pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0 accelerate datasets peft sentencepiece pillow
"""

import copy
import re
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)
from work import (
    CLIP_NORM,
    KL_COEF,
    LOC,
    LR,
    SEG,
    Laps,
    Work,
    asked,
    peak_rss,
    reset_peak_rss,
    say,
    versions,
    work,
)

NEWLINE = 108
IMAGE_FIRST = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
"""A chat template: PaliGemma's processor has none, and TRL takes images in conversations only."""


class Processor(PaliGemmaProcessor):
    """PaliGemma's, without the labels that it adds: TRL would pass them to a function that does not know them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        out.pop("labels", None)
        return out


def model_of(w: Work) -> Any:
    s = w.of
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": s.vision_width, "intermediate_size": s.vision_mlp,
        "num_hidden_layers": s.vision_depth, "num_attention_heads": s.vision_heads, "patch_size": s.patch,
        "image_size": s.image, "vision_use_head": False}  # fmt: skip
    text = {
        "model_type": "gemma", "hidden_size": s.width, "intermediate_size": s.mlp, "num_hidden_layers": s.depth,
        "num_attention_heads": s.heads, "num_key_value_heads": 1, "head_dim": s.head_dim, "vocab_size": s.vocab,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}  # fmt: skip
    ids = {
        "image_token_index": image_id(w),
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=s.width, hidden_size=s.width, **ids
    )
    torch.manual_seed(0)
    with torch.device(w.device):
        return PaliGemmaForConditionalGeneration(config)


def image_id(w: Work) -> int:
    return w.of.text_vocab + LOC + SEG


def processor_of(w: Work) -> Processor:
    """Returns a processor whose text is words, one id each."""
    s = w.of
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "\n": NEWLINE}
    words |= {f"w{i}": i for i in range(4, s.text_vocab) if i != NEWLINE}
    text = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    apart = pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.Split(" ", "removed")
    text.pre_tokenizer = pre_tokenizers.Sequence(list(apart))  # pyright: ignore[reportAttributeAccessIssue]
    text.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    tokens = PreTrainedTokenizerFast(tokenizer_object=text, padding_side="left", **named)
    tokens.add_tokens([f"<loc{i:04d}>" for i in range(LOC)] + [f"<seg{i:03d}>" for i in range(SEG)])
    images = SiglipImageProcessorPil(size={"height": s.image, "width": s.image})
    images.image_seq_length = s.image_tokens
    made = Processor(image_processor=images, tokenizer=tokens, chat_template=IMAGE_FIRST)
    assert made.tokenizer.convert_tokens_to_ids("<image>") == image_id(w)
    return made


def questions(w: Work, seed: int, count: int) -> tuple[list[str], list[Image.Image]]:
    """Returns prompts that become `prompt_tokens` ids each, and images of noise."""
    random = np.random.default_rng(seed)
    ids = random.integers(NEWLINE + 1, 900, (count, w.prompt_tokens - 2))
    side = w.of.image
    images = [
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(count)
    ]
    return [" ".join(f"w{i}" for i in row) for row in ids], images


def loc_share(completions: list[Any], **_: Any) -> list[float]:
    """Returns the share of loc tokens in each text: a reward that random answers differ in."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [len(re.findall(r"<loc\d{4}>", text)) / 16 for text in texts]


class Memory:
    """Waiting for, and the peak memory of, the device."""

    def __init__(self, device: str):
        cuda = device == "cuda"
        self.wait: Callable[[], Any] = torch.cuda.synchronize if cuda else lambda: None
        self.reset: Callable[[], Any] = (
            torch.cuda.reset_peak_memory_stats if cuda else reset_peak_rss
        )
        self.peak: Callable[[], float] = torch.cuda.max_memory_allocated if cuda else peak_rss


def tell(w: Work, model: Any) -> None:
    torch.set_num_threads(w.threads)
    names = ("torch", "transformers") + (("trl", "accelerate") if w.variant == "trl" else ())
    say(
        versions=versions(*names),
        parameters=sum(p.numel() for p in model.parameters()),
        platform=w.device,
    )


def changed(model: Any) -> torch.Tensor:
    """Returns a copy of a parameter that every update moves."""
    return model.model.language_model.norm.weight.detach().clone()


def run_trl(w: Work) -> None:
    """TRL's trainer, whose own loop waits before each step until it is asked for.

    As released, TRL scores PaliGemma's completions with a mask that lets them see ahead: wrong, but as much work.
    """
    import trl
    import trl.trainer.grpo_trainer as module
    from datasets import Dataset
    from transformers import TrainerCallback

    model, memory = model_of(w), Memory(w.device)
    processor, steps = processor_of(w), 1000
    prompts, images = questions(w, 0, w.prompts * 8)
    rows = [
        {"prompt": [{"role": "user", "content": p}], "image": i}
        for p, i in zip(prompts, images, strict=True)
    ]
    module.create_model_from_path = lambda *args, **kwargs: copy.deepcopy(
        model
    )  # the reference: TRL would read it from disk
    arguments = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=w.rows // w.grad_accum_steps,
        gradient_accumulation_steps=w.grad_accum_steps, num_generations=w.group, max_completion_length=w.tokens, max_steps=steps,
        beta=KL_COEF, learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=CLIP_NORM, weight_decay=0.0,
        loss_type="grpo", generation_kwargs={"min_new_tokens": w.tokens}, gradient_checkpointing=w.checkpointing,
        use_cpu=w.device == "cpu", bf16=w.dtype == "bfloat16", report_to="none", logging_strategy="no", save_strategy="no",
        disable_tqdm=True, dataloader_num_workers=0, shuffle_dataset=False)  # fmt: skip
    laps: list[Laps] = []
    seen: dict[str, float] = {}

    class Timed(trl.GRPOTrainer):
        preparing = False

        def _prepare_inputs(self, inputs: Any) -> Any:
            laps[-1].lap(
                "update" if w.grad_accum_steps > 1 and "rollout" in laps[-1].seconds else "data"
            )
            self.preparing = True
            try:
                return super()._prepare_inputs(inputs)
            finally:
                self.preparing = False
                laps[-1].lap("score" if "update" not in laps[-1].seconds else "update")

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            laps[-1].lap("score")
            made = super()._generate_single_turn(*args, **kwargs)
            laps[-1].lap("rollout")
            seen["turns"], seen["completions"] = min(map(len, made[0])), len(made[0])
            assert {len(ids) for ids in args[0]} == {w.of.image_tokens + w.prompt_tokens}
            return made

    class Turns(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            laps[-1].lap("update")
            moved = float((changed(model) - self.before).abs().max())
            laps[-1].report(memory.peak(), grad_norm=float("nan"), moved=moved, **seen)
            control.should_training_stop = not self.wait()

        def wait(self) -> bool:
            wanted = asked()
            self.before = changed(model)
            laps.append(Laps(memory.wait, memory.reset))
            return wanted

    turns = Turns()
    data = Dataset.from_list(rows)
    trainer = Timed(model=model, reward_funcs=[loc_share], args=arguments, train_dataset=data, processing_class=processor,
                    callbacks=[turns])  # fmt: skip
    tell(w, model)
    if turns.wait():
        trainer.train()


def generate_of(
    w: Work, model: Any, mode: str
) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """Returns the sampling of a group for each prompt, by Hugging Face's generate with the named cache."""
    kinds = {"dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True}}
    kinds["compiled"] = {
        "cache_implementation": "static",
        "disable_compile": w.device == "cpu",
    }  # generate compiles on cuda only
    if mode == "compiled" and w.device == "cpu":
        decoder = model.model.language_model
        decoder.forward = torch.compile(decoder.forward, dynamic=False)

    def generate(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with (
            torch.no_grad(),
            torch.autocast(w.device, torch.bfloat16, enabled=w.dtype == "bfloat16"),
        ):
            return model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=w.tokens,
                min_new_tokens=w.tokens, suppress_tokens=[image_id(w)], num_return_sequences=w.group, pad_token_id=0,
                **kinds[mode])  # fmt: skip

    return generate


def inputs_of(w: Work, processor: Processor, seed: int) -> dict[str, torch.Tensor]:
    prompts, images = questions(w, seed, w.prompts)
    texts = ["<image>" + prompt for prompt in prompts]
    made = processor(
        images=[[image] for image in images], text=texts, padding=True, return_tensors="pt"
    )
    assert made["input_ids"].shape[1] == w.of.image_tokens + w.prompt_tokens, made[
        "input_ids"
    ].shape
    return {name: value.to(w.device) for name, value in made.items()}


def run_generate(w: Work, mode: str) -> None:
    model, processor, memory = model_of(w).eval(), processor_of(w), Memory(w.device)
    generate, seed = generate_of(w, model, mode), 0
    tell(w, model)
    while asked():
        inputs, seed = inputs_of(w, processor, seed), seed + 1
        laps = Laps(memory.wait, memory.reset)
        found = generate(inputs)
        laps.lap("rollout")
        laps.report(
            memory.peak(),
            turns=found.shape[1] - inputs["input_ids"].shape[1],
            completions=found.shape[0],
        )


def run_hand(w: Work) -> None:
    """generate, a pass of the reference policy, and TRL's loss on the completion's logits."""
    model, processor, memory = model_of(w), processor_of(w), Memory(w.device)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    if w.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    generate, seed = generate_of(w, model, "dynamic"), 0
    part = w.rows // w.grad_accum_steps
    parts = [slice(start, start + part) for start in range(0, w.rows, part)]

    def logps(policy: Any, inputs: dict[str, torch.Tensor], chosen: torch.Tensor) -> torch.Tensor:
        with torch.autocast(w.device, torch.bfloat16, enabled=w.dtype == "bfloat16"):
            out = policy(**inputs, logits_to_keep=w.tokens + 1, use_cache=False)
        logits = out.logits[:, :-1].float()
        return logits.gather(-1, chosen[..., None])[..., 0] - logits.logsumexp(-1)

    tell(w, model)
    while asked():
        inputs, seed = inputs_of(w, processor, seed), seed + 1
        before = changed(model)
        laps = Laps(memory.wait, memory.reset)
        model.eval()
        found = generate(inputs)
        laps.lap("rollout")
        start = inputs["input_ids"].shape[1]
        chosen = found[:, start:]
        texts = processor.tokenizer.batch_decode(chosen.cpu())
        rewards = torch.tensor(loc_share(texts), device=w.device).view(w.prompts, w.group)
        centred = rewards - rewards.mean(1, keepdim=True)
        advantages = (centred / (rewards.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        pixels = inputs["pixel_values"].repeat_interleave(
            w.group, 0
        )  # Hugging Face's model wants an image for every row
        kinds = torch.zeros_like(found)
        kinds[:, start:] = 1
        full = {
            "input_ids": found,
            "pixel_values": pixels,
            "token_type_ids": kinds,
            "attention_mask": torch.ones_like(found),
        }
        rows = [{name: value[part] for name, value in full.items()} for part in parts]
        with torch.no_grad():
            references = [
                logps(reference, row, chosen[part]) for row, part in zip(rows, parts, strict=True)
            ]
        laps.lap("score")
        model.train()
        for row, part, ref in zip(rows, parts, references, strict=True):
            own, adv = logps(model, row, chosen[part]), advantages[part]
            ratio, apart = torch.exp(own - own.detach()), ref - own
            kept = -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
            loss = kept + KL_COEF * (torch.exp(apart) - apart - 1)
            (loss.mean() * len(adv) / w.rows).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        laps.lap("update")
        moved = float((changed(model) - before).abs().max())
        done = {"turns": chosen.shape[1], "completions": len(chosen)}
        laps.report(memory.peak(), grad_norm=float(norm), moved=moved, **done)


def main() -> None:
    w = work()
    torch.set_num_threads(w.threads)
    kind, _, mode = w.variant.partition(":")
    if kind == "trl":
        run_trl(w)
    elif kind == "hand":
        run_hand(w)
    else:
        run_generate(w, mode)


if __name__ == "__main__":
    main()
