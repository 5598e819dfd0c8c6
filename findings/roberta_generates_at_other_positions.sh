#!/usr/bin/env bash
# transformers' generate gives RoBERTa's causal models other positions than their own forward gives them.
#
# Version: transformers 5.23.0 on torch 2.13.0, CPU.
# Guess: the first logits that generate computes are those of forward on the same tokens, as for every other decoder.
# Seen: they are far apart. forward counts positions from padding_idx + 1, as these models were trained; generate hands in
#   position_ids that count from 0, so that the first token gets a position that no training has seen, and the second one that of
#   padding. A random model of two layers: logits differ by 0.26, the largest is 0.32. With position_ids from 0, forward gives just
#   what generate computed.
# So: text from generate is not what the model's logits say; an export has to follow forward, and a comparison of the two has to know.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0 torch==2.13.0 numpy==2.4.6

cat >compare.py <<'P'
import torch
from transformers import RobertaConfig, RobertaForCausalLM

torch.manual_seed(0)
config = RobertaConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    is_decoder=True,
)
model = RobertaForCausalLM(config).eval()
ids = torch.tensor([[0, 17, 5, 33, 60, 8]])
mask = torch.ones_like(ids)
with torch.no_grad():
    forward = model(ids, attention_mask=mask).logits[:, -1]
    from_zero = model(ids, attention_mask=mask, position_ids=torch.arange(6)[None]).logits[:, -1]
    generated = model.generate(
        ids, attention_mask=mask, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    ).logits[0]
apart, same = (float((each - generated).abs().max()) for each in (forward, from_zero))
print(f"generate and forward: {apart:.3f} apart; generate and forward with positions from 0: {same:.1e}")
assert apart > 0.1, "generate and forward agree now"
assert same < 1e-5, "generate does not count from 0 any more"
P
venv/bin/python compare.py
