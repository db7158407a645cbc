"""The Triton kernels: what they take on each chip (no GPU needed), and how fast they are beside PyTorch's attentions.

    python benchmarks/kernels.py --check
    python benchmarks/kernels.py --json benchmarks/results/kernels.json      (on a CUDA GPU: about five minutes)
    python benchmarks/kernels.py --shapes tiny --batches 2                   (anywhere: tries the script)

``--check`` compiles all kernels ahead of time with the shipped settings, and fails where registers spill or a block
takes more shared memory than the chip has. All else: kernel_times.py, which says what is timed, and kernel_cases.py.
"""

# Nothing is imported here: transformers looks for a package of this name, and finds this file where it stands beside
# the script that runs. It is to find a module that is cheap, and no version in it.

if __name__ == "__main__":
    import typer
    from kernel_times import main

    typer.run(main)
