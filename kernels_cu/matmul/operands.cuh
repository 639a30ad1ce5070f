/* Tensor cores multiply weights and activations here. */
static_assert(LOSART_WEIGHTS == LOSART_ACTIVATIONS, "tensor cores take operands of one format");
#define OPERAND_FORMAT LOSART_WEIGHTS
