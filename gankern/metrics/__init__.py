"""The figures that people judge GANs by: on points whose distribution is known, on images, and on their features."""

from gankern.metrics.extractors import Extractor, Features, load, train_classifier, trained
from gankern.metrics.features import frechet_distance, inception_score, kernel_distance
from gankern.metrics.modes import ModeCoverage, mode_coverage
from gankern.metrics.parzen import choose_sigma, parzen_log_likelihood
from gankern.metrics.swd import laplacian_pyramid, laplacian_swd, sliced_wasserstein
from gankern.metrics.transport import earth_movers_distance, wasserstein_estimate

__all__ = [
    "Extractor",
    "Features",
    "ModeCoverage",
    "choose_sigma",
    "earth_movers_distance",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "laplacian_pyramid",
    "laplacian_swd",
    "load",
    "mode_coverage",
    "parzen_log_likelihood",
    "sliced_wasserstein",
    "train_classifier",
    "trained",
    "wasserstein_estimate",
]
