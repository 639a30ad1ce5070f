/* Tensor cores multiply these of the cache. */
#define OPERAND_FORMAT LOSART_KV_OPERANDS
