"""Steps of a torch user: a loop written by hand, or Hugging Face's generate alone.

`variant` is hand, or generate:CACHE with CACHE dynamic, static or compiled.
pip install torch==2.13.0 transformers==5.23.0 accelerate sentencepiece pillow
"""

import copy
import re
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
    PhaseTimer,
    Work,
    peak_rss,
    read_work,
    reset_peak_rss,
    send,
    versions,
    wait_for_request,
)

NEWLINE = 108

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %}{% endif %}{% endfor %}"
)
"""PaliGemma's processor has no chat template, but TRL takes images only in conversations."""


class Processor(PaliGemmaProcessor):
    """PaliGemma's processor without the labels that it adds.

    TRL would pass the labels to a function that does not take them.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().__call__(*args, **kwargs)
        inputs.pop("labels", None)
        return inputs


def make_model(work: Work) -> Any:
    """Returns a PaliGemma of the work's size with random parameters."""
    size = work.model_size
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": size.vision_width,
        "intermediate_size": size.vision_mlp,
        "num_hidden_layers": size.vision_depth,
        "num_attention_heads": size.vision_heads,
        "patch_size": size.patch,
        "image_size": size.image,
        "vision_use_head": False,
    }
    text = {
        "model_type": "gemma",
        "hidden_size": size.width,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "num_key_value_heads": 1,
        "head_dim": size.head_dim,
        "vocab_size": size.vocab,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        projection_dim=size.width,
        hidden_size=size.width,
        image_token_index=image_token_id(work),
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(work.device):
        return PaliGemmaForConditionalGeneration(config)


def image_token_id(work: Work) -> int:
    """Returns the first id after the loc and seg tokens."""
    return work.model_size.text_vocab + LOC + SEG


def make_processor(work: Work) -> Processor:
    """Returns a processor with one id per word."""
    size = work.model_size
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "\n": NEWLINE}
    words |= {f"w{i}": i for i in range(4, size.text_vocab) if i != NEWLINE}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    splits = pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.Split(" ", "removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(splits))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )
    loc_tokens = [f"<loc{i:04d}>" for i in range(LOC)]
    tokenizer.add_tokens(loc_tokens + [f"<seg{i:03d}>" for i in range(SEG)])
    images = SiglipImageProcessorPil(size={"height": size.image, "width": size.image})
    images.image_seq_length = size.image_tokens
    processor = Processor(image_processor=images, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == image_token_id(work)
    return processor


def random_questions(work: Work, seed: int, count: int) -> tuple[list[str], list[Image.Image]]:
    """Returns prompts that become `prompt_tokens` ids each, and images of noise."""
    random = np.random.default_rng(seed)
    ids = random.integers(NEWLINE + 1, 900, (count, work.prompt_tokens - 2))
    side = work.model_size.image
    images = [
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(count)
    ]
    return [" ".join(f"w{i}" for i in row) for row in ids], images


def loc_share(completions: list[Any], **_: Any) -> list[float]:
    """Returns the share of loc tokens in each text: a reward that differs between answers."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [len(re.findall(r"<loc\d{4}>", text)) / 16 for text in texts]


class Device:
    """Synchronisation and peak memory of the device."""

    def __init__(self, device: str):
        is_cuda = device == "cuda"
        self.wait: Callable[[], Any] = torch.cuda.synchronize if is_cuda else lambda: None
        self.reset_peak: Callable[[], Any] = (
            torch.cuda.reset_peak_memory_stats if is_cuda else reset_peak_rss
        )
        self.peak: Callable[[], float] = torch.cuda.max_memory_allocated if is_cuda else peak_rss

    def timer(self) -> PhaseTimer:
        """Starts a step."""
        return PhaseTimer(self.wait, self.reset_peak)


def send_facts(work: Work, model: Any, *packages: str) -> None:
    """Sends the versions of torch and of other packages, and the number of parameters."""
    torch.set_num_threads(work.threads)
    send(
        versions=versions("torch", "transformers", *packages),
        parameters=sum(p.numel() for p in model.parameters()),
        platform=work.device,
    )


def final_norm(model: Any) -> torch.Tensor:
    """Returns a copy of a parameter that every update changes."""
    return model.model.language_model.norm.weight.detach().clone()


def make_generate(
    work: Work, model: Any, cache: str
) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """Returns the function that samples a group for each prompt with Hugging Face's generate."""
    on_cpu = work.device == "cpu"
    cache_options: dict[str, Any] = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        # generate compiles only on cuda.
        "compiled": {"cache_implementation": "static", "disable_compile": on_cpu},
    }[cache]
    if cache == "compiled" and on_cpu:
        decoder = model.model.language_model
        decoder.forward = torch.compile(decoder.forward, dynamic=False)

    def generate(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        uses_bfloat16 = work.dtype == "bfloat16"
        with (
            torch.no_grad(),
            torch.autocast(work.device, torch.bfloat16, enabled=uses_bfloat16),
        ):
            return model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=work.tokens,
                min_new_tokens=work.tokens,
                suppress_tokens=[image_token_id(work)],
                num_return_sequences=work.group,
                pad_token_id=0,
                **cache_options,
            )

    return generate


def make_inputs(work: Work, processor: Processor, seed: int) -> dict[str, torch.Tensor]:
    """Returns the processed prompts and images of one step."""
    prompts, images = random_questions(work, seed, work.prompts)
    inputs = processor(
        images=[[image] for image in images],
        text=["<image>" + prompt for prompt in prompts],
        padding=True,
        return_tensors="pt",
    )
    length = inputs["input_ids"].shape[1]
    assert length == work.model_size.image_tokens + work.prompt_tokens, length
    return {name: value.to(work.device) for name, value in inputs.items()}


def run_generate(work: Work, cache: str) -> None:
    """Runs sampling alone."""
    model = make_model(work).eval()
    processor = make_processor(work)
    device = Device(work.device)
    generate = make_generate(work, model, cache)
    seed = 0
    send_facts(work, model)
    while wait_for_request():
        inputs = make_inputs(work, processor, seed)
        seed += 1
        timer = device.timer()
        sequences = generate(inputs)
        timer.end_phase("rollout")
        timer.send(
            device.peak(),
            decode_steps=sequences.shape[1] - inputs["input_ids"].shape[1],
            completions=sequences.shape[0],
        )


def completion_logps(
    work: Work, policy: Any, inputs: dict[str, torch.Tensor], completions: torch.Tensor
) -> torch.Tensor:
    """Returns the log-probabilities of the completions' tokens, [rows, tokens]."""
    with torch.autocast(work.device, torch.bfloat16, enabled=work.dtype == "bfloat16"):
        output = policy(**inputs, logits_to_keep=work.tokens + 1, use_cache=False)
    logits = output.logits[:, :-1].float()
    return logits.gather(-1, completions[..., None])[..., 0] - logits.logsumexp(-1)


def grpo_loss(logps: torch.Tensor, ref_logps: torch.Tensor, advantages: Any) -> torch.Tensor:
    """Returns TRL's GRPO loss of each token: the clipped ratio and the k3 estimate of the KL."""
    ratio = torch.exp(logps - logps.detach())
    log_ratio = ref_logps - logps
    policy_loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return policy_loss + KL_COEF * (torch.exp(log_ratio) - log_ratio - 1)


def group_advantages(work: Work, completions: torch.Tensor, processor: Processor) -> torch.Tensor:
    """Returns the advantages of the completions, [rows, 1]."""
    texts = processor.tokenizer.batch_decode(completions.cpu())
    rewards = torch.tensor(loc_share(texts), device=work.device).view(work.prompts, work.group)
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + 1e-4)).view(-1, 1)


def model_inputs(
    work: Work, inputs: dict[str, torch.Tensor], sequences: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns the inputs of a pass over prompts and completions."""
    token_types = torch.zeros_like(sequences)
    token_types[:, inputs["input_ids"].shape[1] :] = 1
    return {
        "input_ids": sequences,
        # Hugging Face's model needs an image for every row.
        "pixel_values": inputs["pixel_values"].repeat_interleave(work.group, 0),
        "token_type_ids": token_types,
        "attention_mask": torch.ones_like(sequences),
    }


def apply_gradients(model: Any, optimizer: torch.optim.Optimizer) -> float:
    """Clips the gradients and updates the parameters. Returns the norm before the clip."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def run_hand(work: Work) -> None:
    """Runs generate, a pass of the reference policy, and TRL's loss on the completion's logits."""
    model = make_model(work)
    processor = make_processor(work)
    device = Device(work.device)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    if work.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    generate = make_generate(work, model, "dynamic")
    seed = 0
    part_size = work.completions // work.grad_accum_steps
    parts = [slice(i, i + part_size) for i in range(0, work.completions, part_size)]
    send_facts(work, model)
    while wait_for_request():
        inputs = make_inputs(work, processor, seed)
        seed += 1
        before = final_norm(model)
        timer = device.timer()
        model.eval()
        sequences = generate(inputs)
        timer.end_phase("rollout")
        completions = sequences[:, inputs["input_ids"].shape[1] :]
        advantages = group_advantages(work, completions, processor)
        all_inputs = model_inputs(work, inputs, sequences)
        part_inputs = [{name: value[part] for name, value in all_inputs.items()} for part in parts]
        with torch.no_grad():
            ref_logps = [
                completion_logps(work, reference, rows, completions[part])
                for rows, part in zip(part_inputs, parts, strict=True)
            ]
        timer.end_phase("score")
        model.train()
        for rows, part, ref in zip(part_inputs, parts, ref_logps, strict=True):
            logps = completion_logps(work, model, rows, completions[part])
            loss = grpo_loss(logps, ref, advantages[part])
            (loss.mean() * len(loss) / work.completions).backward()
        norm = apply_gradients(model, optimizer)
        timer.end_phase("update")
        timer.send(
            device.peak(),
            grad_norm=norm,
            parameter_change=float((final_norm(model) - before).abs().max()),
            decode_steps=completions.shape[1],
            completions=len(completions),
        )


def main() -> None:
    work = read_work()
    torch.set_num_threads(work.threads)
    kind, _, cache = work.variant.partition(":")
    if kind == "hand":
        run_hand(work)
    else:
        run_generate(work, cache)


if __name__ == "__main__":
    main()
