/* Tensor cores multiply these of the cache by wgmma: 16-bit values as they are, and codes as float16, which holds them
 * exactly and takes fewer instructions to unpack into than bfloat16. */
#define OPERAND_FORMAT (IS_CODED ? FLOAT16 : LOSART_KV_OPERANDS)
