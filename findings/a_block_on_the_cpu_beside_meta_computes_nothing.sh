#!/usr/bin/env bash
# transformers with a device_map of "meta" and one block on "cpu" leaves that block on meta too, and it answers with no numbers.
#
# Version: transformers 5.23.0 with accelerate 1.15.0 on torch 2.13.0, CPU.
# Guess: the block's parameters are on the CPU, as the map says, the others on meta; the block computes on a CPU tensor.
# Seen: all parameters are on meta. "cpu" beside another device means offloading, also where that other device is meta: the block's
#   weights are in its hooks, and move to the main device, meta, for each call. A layer of the block takes a CPU tensor and returns a
#   meta tensor; nothing is raised, and hf_device_map still says "cpu".
# So: to load a few blocks of a large model for a look at their weights, take them from the hooks (weights_map), not from the modules.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6

cat >load.py <<'P'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
LlamaForCausalLM(config).save_pretrained("checkpoint")
model = LlamaForCausalLM.from_pretrained("checkpoint", device_map={"": "meta", "model.layers.0": "cpu"})
block = model.model.layers[0]
devices = {parameter.device.type for parameter in block.parameters()}
found = block.mlp(torch.randn(1, 3, 32))
print(f"the map: {model.hf_device_map['model.layers.0']}; the block's parameters: {devices}; its MLP answers on {found.device}")
assert model.hf_device_map["model.layers.0"] == "cpu"
assert devices == {"meta"}, "the block is where it was asked for now"
assert found.device.type == "meta", "the block computes now"
P
venv/bin/python load.py
