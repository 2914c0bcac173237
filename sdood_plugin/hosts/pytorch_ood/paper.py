"""The publication all of this comes from, as the host records it."""

from pytorch_ood.api import Paper

PAPER = Paper(
    title="Diffusion-based Semantic-Discrepant Outlier Generation for Out-of-Distribution Detection",
    venue="NeurIPS Workshop",
    year=2023,
    # a search by title: the poster names no address of its own
    url="https://openreview.net/search?term=Diffusion-based+Semantic-Discrepant+Outlier+Generation",
)
