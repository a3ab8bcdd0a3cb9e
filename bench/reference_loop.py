"""A plain QLoRA loop on transformers, PEFT and bitsandbytes, for comparison; uses none of ours.

It reads raw text, builds its own labels, and runs the micro-batches of all ranks one by one in one
process, so that sums have the order that a data-parallel run gives them.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def read_rows(path, tokenizer, max_tokens):
    """Tokens and labels of question<TAB>answer lines."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        question, answer = line.split("\t")
        prompt = tokenizer.encode(
            f"### Human: {question}\n### Assistant: ", add_special_tokens=False
        )
        prompt = [tokenizer.bos_token_id, *prompt]
        reply = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append(((prompt + reply)[:max_tokens], ([-100] * len(prompt) + reply)[:max_tokens]))
    return rows


def main():
    """Train and save the losses and the gradients of every step."""
    parser = argparse.ArgumentParser()
    for name in ("model", "data", "start", "output"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("processes", "accumulation", "steps", "max-tokens", "r", "alpha", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--max-grad-norm", type=float, required=True)
    parser.add_argument("--order", required=True, help="JSON file: sample ids of every step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = read_rows(args.data, tokenizer, args.max_tokens)
    base = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    base.requires_grad_(False)
    config = LoraConfig(
        r=args.r, lora_alpha=args.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).train()
    start = load_file(args.start)
    parameters = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.replace(".default", "")
            parameters[key] = parameter
            parameter.data.copy_(start.pop(key))
    assert not start
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0
    )

    order = json.loads(Path(args.order).read_text())
    losses, gradients = [], {}
    for step, ids in enumerate(order):
        # One step of warm-up, as transformers' schedulers count: the first step's rate is 0.
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if step == 0 else args.lr
        targets = sum(sum(1 for label in rows[i][1][1:] if label != -100) for i in ids)
        summed, loss_parts = None, []
        for rank in range(args.processes):
            model.zero_grad()
            rank_loss = torch.zeros(())
            for turn in range(args.accumulation):
                tokens, labels = rows[ids[turn * args.processes + rank]]
                logits = model(input_ids=torch.tensor([tokens])).logits
                loss = torch.nn.functional.cross_entropy(
                    logits[0, :-1], torch.tensor(labels[1:]), reduction="sum"
                )
                (loss / targets).backward()
                rank_loss += (loss / targets).detach()
            loss_parts.append(float(rank_loss))
            mine = [parameter.grad for parameter in parameters.values()]
            summed = mine if summed is None else [a + b for a, b in zip(summed, mine, strict=True)]
        for parameter, gradient in zip(parameters.values(), summed, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters.values(), args.max_grad_norm)
        for key, parameter in parameters.items():
            gradients[f"{step}:{key}"] = parameter.grad.clone()
        optimizer.step()
        losses.append(math.fsum(loss_parts))
    save_file(gradients, f"{args.output}.safetensors")
    Path(f"{args.output}.json").write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main()
