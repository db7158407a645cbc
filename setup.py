"""Packaging: passes/, kernels/ and export/ stand at the top of the repository and install inside vte_compile."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
SUBPACKAGES = ("passes", "kernels", "export")

version: dict[str, str] = {}
exec((ROOT / "vte_compile" / "version.py").read_text(encoding="utf-8"), version)

packages = find_packages(include=["vte_compile", "vte_compile.*"])
for name in SUBPACKAGES:
    packages.append(f"vte_compile.{name}")
    packages.extend(f"vte_compile.{name}.{inner}" for inner in find_packages(name))

demo = ["matplotlib", "pillow"]
# What an ONNX engine takes to run text and pictures; the sandbox of older versions of jinja2 has holes.
chat = ["tokenizers", "jinja2>=3.1.6", "pillow"]

setup(
    name="vte-compile",
    version=version["__version__"],
    description="Compile multimodal LLMs so that visual tokens leave the decoder early",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=packages,
    package_dir={f"vte_compile.{name}": name for name in SUBPACKAGES},
    package_data={
        "vte_compile": ["py.typed", "demo/assets/**"],
        "vte_compile.kernels": ["triton_settings.json"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "safetensors",
        "huggingface_hub",
        "numpy",
        "tqdm",
        "typer",
        "rich",
    ],
    extras_require={
        "onnx": ["onnx", "onnxscript", "onnxruntime", *chat],
        "onnx-gpu": ["onnx", "onnxscript", "onnxruntime-gpu", *chat],
        "tensorrt": ["onnx", "onnxscript", "onnxruntime", "tensorrt>=10", *chat],
        "tensorrt-rtx": ["onnx", "onnxscript", "onnxruntime", "tensorrt-rtx", *chat],
        "train": ["accelerate", "datasets"],
        "demo": demo,
        "dev": [
            "accelerate",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            # The version that torch 2.13 is made for; its interpreter runs the kernels where there is no GPU.
            "triton>=3.7,<3.8; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "hypothesis",
            "ruff",
            "mypy",
            "types-tqdm",
            *demo,
        ],
    },
    entry_points={
        "console_scripts": ["vte-compile = vte_compile.cli:main"],
        "torch_dynamo_backends": ["vte = vte_compile.dynamo.backend:vte"],
        "lmms_eval.models": ["vte_compile = vte_compile.tuning.lmms_eval_plugin:manifest"],
    },
)
