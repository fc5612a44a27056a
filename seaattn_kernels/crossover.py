"""From which size on folded PyTorch is expected to be faster than the fused block: data.

Exact float32 products leave the matrix units, and a library's are faster there than Triton's, so
that large blocks lose what small ones win by fewer launches. In half precision and TF32 the fused
block is expected to win at every size.

Predicted by ``bench/stages.py`` (``crossover_flops``) for the cards of ``bench/static.py``, and
measured on none.
"""

#: FLOP of a call up to which the fused block is taken in exact float32, by compute capability.
#: What is not listed takes it always.
EXACT_FLOAT32_FLOPS = {
    (8, 0): 4.2e8,
    (9, 0): 1.7e9,
    (10, 0): 1.7e9,
}
