"""Packaging, read from settings.ini (one place for names, versions and requirements)."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def names(key):
    return cfg.get(key, "").split()


extras = {
    "lab": names("lab_requirements"),
    "extra": names("extra_requirements"),
    "dev": names("dev_requirements"),
}
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8")
    if (here / "README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    packages=find_packages(include=["snnkd_nb", "snnkd_nb.*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=names("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": names("console_scripts")},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
