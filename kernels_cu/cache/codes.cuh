/* Codes of keys and values as operands, as of unpack_integers. */
template <bool ODD> __device__ __forceinline__ unsigned unpack_codes(unsigned word)
{
    return LOSART_KV == KV_INT8 ? unpack_integers<ODD>(word) : unpack_floats<ODD>(word);
}
