"""Inference: a GPT-2 of transformers, as it is, with ``backend="fuse"``, beside eager PyTorch.

    python examples/inference.py

prints

    4 attention sites, 4 fused
    the largest difference from eager: below 1e-4
"""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2Model

import fuse


def main() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_embd=256, n_head=8, vocab_size=1000, bos_token_id=None, eos_token_id=None, attn_implementation="eager"
    )
    model = GPT2Model(config).eval()
    compiled = torch.compile(model, backend="fuse")
    tokens = torch.randint(0, config.vocab_size, (2, 200))
    with torch.inference_mode():
        found, expected = (run(input_ids=tokens).last_hidden_state for run in (compiled, model))
    print(fuse.report().summary)
    apart = (found - expected).abs().max().item()
    print("the largest difference from eager:", "below 1e-4" if apart < 1e-4 else apart)


if __name__ == "__main__":
    main()
