"""In which formats a model's weights, its keys and values, and its activations are held."""

from __future__ import annotations

from dataclasses import dataclass

from losart.errors import OptionError


@dataclass(frozen=True)
class Format:
    """How one number is held.

    Attributes
    ----------
    name : str
    bits : int
    code : int
        What compiled code calls it: `LOSART_WEIGHTS` and its like in CUDA sources, `width` in Cython modules.
    array : str
        NumPy dtype of an array of such numbers on the host; bfloat16, which NumPy lacks, as its bits.
    bits_array : str
        The same on a GPU, where all formats of 16 bits are held as their bits.
    safetensors : str
        Name in a safetensors header.
    cuda_type : int
        cudaDataType_t, as cuBLAS takes it.
    """

    name: str
    bits: int
    code: int
    array: str
    bits_array: str
    safetensors: str
    cuda_type: int

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Of the float32 scale that a key or a value of a kv head has beside codes of 8 bits."""
        return 4 if self.bits == 8 else 0


FLOAT32 = Format("float32", 32, 0, "float32", "float32", "F32", 0)
BFLOAT16 = Format("bfloat16", 16, 1, "uint16", "uint16", "BF16", 14)
FLOAT16 = Format("float16", 16, 2, "float16", "uint16", "F16", 2)
FORMATS = {format.name: format for format in (FLOAT32, BFLOAT16, FLOAT16)}
DTYPES = tuple(FORMATS)
# Keys and values alone: with the largest magnitude of a key's, or a value's, channels as the outermost code.
KV_INT8 = Format("int8", 8, 3, "uint8", "uint8", "U8", 3)
KV_FLOAT8 = Format("fp8", 8, 4, "uint8", "uint8", "U8", 28)
KV_FORMATS = {format.name: format for format in (KV_INT8, KV_FLOAT8)}
ACTIVATIONS = ("auto", "fp8")
# Codes of quantized matrices that each device multiplies by; others become numbers of the dtype.
QUANTIZED = {"cpu": ("int4", "int8"), "cuda": ("int4", "int8", "float8")}

GROUP_PAGES = 16  # pages of the KV cache whose bounds share a base and a step per channel


@dataclass(frozen=True)
class Precision:
    """The formats of a model on a backend.

    Attributes
    ----------
    weights : Format
        Of matrices; norm gains and biases are float32.
    kv : Format
        Of the KV cache.
    activations : Format
        Of what enters a matmul on a GPU. The CPU computes in float32.
    float8_activations : bool
        Whether those of many tokens are rounded to E4M3, with a scale for each token, where a GPU multiplies
        them by weights that are E4M3 too.
    """

    weights: Format
    kv: Format
    activations: Format
    float8_activations: bool = False

    @property
    def kv_operands(self) -> Format:
        """In which tensor cores multiply keys and values, and page bounds are held."""
        return self.activations if self.kv.bits == 8 else self.kv

    @classmethod
    def of(cls, dtype: str, kv: str = "auto", activations: str = "auto") -> Precision:
        """All three in one format, named as in `FORMATS`, unless `kv` is one of `KV_FORMATS`."""
        format = FORMATS[dtype]
        return cls(format, KV_FORMATS.get(kv, format), format, activations == "fp8")

    @classmethod
    def chosen(cls, dtype: str, kv: str, auto: str, activations: str = "auto") -> Precision:
        """As `of`, with `auto` for the caller's dtype "auto".

        Raises
        ------
        OptionError
            There is no such format.
        """
        if dtype not in ("auto", *DTYPES):
            raise OptionError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}")
        if kv not in ("auto", *KV_FORMATS):
            raise OptionError(f"kv must be auto, {', '.join(KV_FORMATS)}, not {kv!r}")
        if activations not in ACTIVATIONS:
            raise OptionError(f"activations must be {' or '.join(ACTIVATIONS)}, not {activations!r}")
        return cls.of(auto if dtype == "auto" else dtype, kv, activations)
