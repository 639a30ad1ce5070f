/* Tensor cores multiply what the cache holds here. */
#define OPERAND_FORMAT LOSART_KV
