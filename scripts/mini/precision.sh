# Sourced. PRECISION: bf16 where the processor computes in it (2-3 times faster there), fp32 elsewhere.
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then PRECISION=bf16; else PRECISION=fp32; fi
