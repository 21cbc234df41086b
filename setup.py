"""Packages of the wheel: the floors stand at the root of the repository and are installed inside `specgym`."""

from setuptools import find_packages, setup

FLOORS = ("decoding", "envs", "agents", "callbacks")

setup(
    packages=[
        "specgym",
        *(f"specgym.{name}" for floor in FLOORS for name in find_packages(include=[floor, f"{floor}.*"])),
    ],
    package_dir={"specgym": "specgym", **{f"specgym.{floor}": floor for floor in FLOORS}},
)
