/* Codes as operands of tensor cores, two of 16 bits in a word; they are exact. After tensor.cuh. */
#define BOTH(bits) ((bits) * 0x10001u) /* in both halves of a word */
#define IS_BF16 (OPERAND_FORMAT == BFLOAT16)
#define MINUS_ONE BOTH(IS_BF16 ? 0xbf80u : 0xbc00u)

__device__ __forceinline__ unsigned fma_pair(unsigned a, unsigned b, unsigned c)
{
    unsigned d;
    asm("fma.rn." OPERAND_PTX "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

/* The bits of x, or with INVERTED those that it has not, of a mask, and some others: one instruction. */
template <bool INVERTED = false>
__device__ __forceinline__ unsigned bits_or(unsigned x, unsigned mask, unsigned others)
{
    unsigned d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(x), "r"(mask), "r"(others), "n"(INVERTED ? 0xae : 0xea));
    return d;
}

/* Of a word's four integers, held from 0 on for -128, bytes 0 and 2, or with ODD 1 and 3.
 *
 * Or-ing n < 128 into the mantissa of bfloat16 128 gives 128 + n, and n < 1024 into float16 1024 gives 1024 + n. Bit 7
 * does not fit into bfloat16's mantissa: where it is 0, it makes 256 of the 128 that is subtracted. */
template <bool ODD> __device__ __forceinline__ unsigned unpack_integers(unsigned word)
{
    unsigned code = word >> ODD * 8;
    if (IS_BF16)
        return fma_pair(bits_or<true>(code, 0x00800080u, 0x43004300u), MINUS_ONE,
                        bits_or(code, 0x007f007fu, 0x43004300u));
    return fma_pair(bits_or(code, 0x00ff00ffu, 0x64006400u), BOTH(0x3c00u), BOTH(0xe480u));
}

/* The same of E4M3 numbers, which are not NaN: shifted, their bits are the number with another exponent bias, also if
 * it is subnormal. */
template <bool ODD> __device__ __forceinline__ unsigned unpack_floats(unsigned word)
{
    unsigned sign = (ODD ? word : word << 8) & 0x80008000u;
    unsigned rest = IS_BF16 ? (ODD ? word >> 4 : word << 4) : ODD ? word >> 1 : word << 7;
    unsigned bits = bits_or(rest, IS_BF16 ? 0x07f007f0u : 0x3f803f80u, sign);
    return fma_pair(bits, BOTH(IS_BF16 ? 0x7b80u : 0x5c00u), BOTH(0x8000u));
}
