"""`python -m jaxgemm.bench`: kernel durations of this library beside those of its peers, measured in the same run.

    python -m jaxgemm.bench gemm --suite deepgemm --json gemm.json
    python -m jaxgemm.bench gemm --m 1,4096 --n 7168 --k 2048 --vs xla-bf16,xla-fp8
    python -m jaxgemm.bench quantize
    python -m jaxgemm.bench dense
    python -m jaxgemm.bench grouped --suite mixtral --only 'masked .*'
    python -m jaxgemm.bench train --layers 4 --batch 2    a language model's training steps, tokens a second, memory
    python -m jaxgemm.bench gemm --compare old.json       exits 1 if anything is more than 5 % slower than it was
    python -m jaxgemm.bench tune --suite llama            finds the fastest tiles and stores them (docs/tuning.md)
    python -m jaxgemm.bench export-rows --table FILE      merges stored tiles into a table that can be shipped
    python -m jaxgemm.bench readme                        writes benchmarks/results/*.json into README's tables

What is measured: the sum of the durations of the GPU kernels of one call (CUPTI), the median over back-to-back calls,
random normal data, compiled beforehand. All columns of a row take turns, so that they see the same clocks. "cold" rows
rotate through weights of more than 200 MB, so that these come from memory and not from the L2 cache.
"""
