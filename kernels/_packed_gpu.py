"""What the Triton kernels over packed sequences share."""

import triton
import triton.language as tl


@triton.jit
def token_range(cu_seqlens, sequence, num_tokens):
    """Return a sequence's first token and the one behind its last, within the tokens.

    Nobody has looked at the values of cu_seqlens on a GPU, so this keeps reads and writes inside.
    """
    begin = tl.maximum(tl.load(cu_seqlens + sequence), 0)
    return begin, tl.minimum(tl.load(cu_seqlens + sequence + 1), num_tokens)
