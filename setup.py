"""The part of the build that pyproject.toml cannot declare: the native library and the torch that it pins."""

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).parent.resolve() / "build_backend"))

import mobilemamba_build as native

setup(
    install_requires=[native.torch_requirement(), "numpy", "pillow"],
    ext_modules=[Extension("mobilemamba._C", sources=[])],  # the sources are known once CUDA is decided upon
    cmdclass={"build": native.CleanBuild, "build_ext": native.build_ext_class(), "bdist_wheel": native.PlainWheel},
    options={"build": {"build_base": native.build_base()}},
)
