"""Weight schemes: linears and the embedding swapped from outside for ones that keep their matrix in fewer bits.

`weights` says what each scheme stores and what that stands for, `calibration` how four bits are chosen by the weights
alone, `gptq` how codes are by example inputs, `examples` what a decoder's layers make of example texts. `linears` says
what takes a linear's place, `packed` how its adapters may stand beside it, `swap` which linears, `host` what a CPU
computes faster. For inference only.
"""
