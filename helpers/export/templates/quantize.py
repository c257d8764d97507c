"""llama.cpp's quantizer, in a process of its own: quantize.py SOURCE TARGET NUMBER-OF-THE-FORMAT."""

import sys

from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize

settings = LlamaModelQuantizeParams()
settings.ftype, settings.nthread = int(sys.argv[3]), 0  # 0: all cores
model_quantize(sys.argv[1], sys.argv[2], settings)
