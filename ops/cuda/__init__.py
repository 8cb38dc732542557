"""What operators with kernels in CUDA C++ share: the compiler, the launch, and instructions as functions."""
