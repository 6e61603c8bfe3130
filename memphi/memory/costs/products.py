"""What products with quantised weights need beside their inputs and outputs."""

from memphi.config import ModelConfig, Scheme
from memphi.memory.costs.cost import MIB, Cost
from memphi.memory.costs.groups import largest_matrix
from memphi.memory.costs.sizes import all_ranks, decoder_linears

DEQUANTISED_NUMBERS = 8 * MIB
"""Numbers of a quantised weight, or of an activation in fp8, that are there in another form at once."""
NUMBERS_A_TOKEN = 8 * 1024
"""More of a weight for many tokens, whose product takes longer: all of the official one's, with adapters, for 8,192."""


def dequantised_numbers(tokens: int) -> int:
    """Numbers of one of the decoder's weights, with its adapters, that so many tokens are multiplied by at once."""
    return max(DEQUANTISED_NUMBERS, NUMBERS_A_TOKEN * tokens)


def with_block(cost: Cost, beside_bytes: int, config: ModelConfig, scheme: Scheme, dtype_bytes: int) -> Cost:
    """A step's cost, where products need a block of a quantised weight in 16 bits beside so much of what they compute.

    In e4m3 inputs stand there too, in beside_bytes; in int4 as codes and in fp32 before.
    """
    if scheme == "bf16":
        return cost
    each = dtype_bytes + {"int8": 0, "int4": 5, "fp8": 4}[scheme]
    numbers = min(DEQUANTISED_NUMBERS, largest_matrix(config))
    formula = f"{cost.formula}; or products beside {numbers} numbers of a weight, dequantised, x {each} bytes"
    return Cost(cost.name, max(cost.bytes, beside_bytes + numbers * each), formula)


def input_bytes(config: ModelConfig, tokens: int, dtype_bytes: int) -> int:
    """The widest input of the decoder's linears in e4m3, with a scale for each token, and a block of it in fp32."""
    if config.scheme != "fp8":
        return 0
    numbers = tokens * max(n_in for n_in, _ in decoder_linears(config.language))
    return numbers + 4 * tokens + min(numbers, DEQUANTISED_NUMBERS) * (5 + dtype_bytes)


def kernel_product_bytes(config: ModelConfig, tokens: int, dtype_bytes: int) -> int:
    """What a product with a quantised weight needs beside its output through memphi's own kernels, which make a block
    16 bits again in one pass; in e4m3 as without them, where a card has no units for it. For many tokens all of A is
    made 16 bits before a block, and in e4m3 B behind the product.
    """
    if config.scheme == "bf16":
        return 0
    numbers, ranks = min(DEQUANTISED_NUMBERS, largest_matrix(config)), all_ranks(config)
    if config.scheme == "fp8":
        adapters = ranks * max(n_out for _, n_out in decoder_linears(config.language))
        block_bytes = max(numbers * (dtype_bytes + 4), adapters * dtype_bytes)
        return block_bytes + input_bytes(config, tokens, dtype_bytes)
    adapters = ranks * max(n_in for n_in, _ in decoder_linears(config.language))
    largest = max(n_out * (n_in + ranks) for n_in, n_out in decoder_linears(config.language))
    return max(numbers, adapters, min(dequantised_numbers(tokens), largest)) * dtype_bytes
