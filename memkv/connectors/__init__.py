"""Plug-ins of inference engines. Each module is loaded by its engine, by name, and imports that engine:

    sglang.py         SGLang HiCache storage backend                     docs/engines/sglang.md
    lmcache_l2.py     LMCache multi-process L2 adapter                   docs/engines/lmcache.md
    lmcache_plugin.py LMCache in-process storage plug-in
    vllm_tier.py      vLLM secondary tier, below its host tier           docs/engines/vllm.md
    vllm_gpu.py       vLLM connector, GPU ↔ memkv
    vllm_plugin.py    vLLM's entry point, which makes both known by name
    transformers.py   save_prefix and restore_prefix                     docs/engines/transformers.md

Files named ENGINE_*.py besides these are parts of that engine's: what names its blocks (_identity, _keys),
where they lie, how it is told of them.

What they share: settings.py (what an operator says: nodes, secret, deadlines) and identity.py (what a block
is of: model, dtype, layout, rank; from it come namespace and keys).
"""
