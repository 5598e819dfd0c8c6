"""How fast onnxruntime-genai runs a folder, alone in a process: python generation_speed.py FOLDER [TOKENS [PIECE]].

Two threads. Prints the seconds of a prompt of 128 tokens, or as many as are wanted, and of each of the 128 tokens after it,
medians of a few generations. PIECE: as many tokens of the prompt are read at once; all, if it is left out.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import numpy as np
import onnxruntime_genai as genai

PROMPT, NEW = 128, 128
THREADS = 2
GENERATIONS = 4  # the first warms up


def main() -> None:
    config = genai.Config(sys.argv[1])
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
    prompt = int(sys.argv[2]) if len(sys.argv) > 2 else PROMPT
    if len(sys.argv) > 3:
        config.overlay(json.dumps({"search": {"chunk_size": int(sys.argv[3])}}))
    model = genai.Model(config)
    prompts, tokens = [], []
    for _ in range(GENERATIONS):
        settings = genai.GeneratorParams(model)
        settings.set_search_options(max_length=prompt + NEW, min_length=prompt + NEW, do_sample=False)
        generator = genai.Generator(model, settings)
        start = time.perf_counter()
        generator.append_tokens((np.arange(prompt) * 37 % 40000 + 100).astype(np.int32))
        generator.generate_next_token()
        prompts.append(time.perf_counter() - start)
        while not generator.is_done():
            start = time.perf_counter()
            generator.generate_next_token()
            tokens.append(time.perf_counter() - start)
    print(json.dumps([median(prompts[1:]), median(tokens[NEW:])]))


if __name__ == "__main__":
    main()
