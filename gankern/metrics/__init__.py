"""The figures that people judge GANs by: on points whose distribution is known, on images, and on their features."""

from gankern.metrics.bins import DifferentBins, compare_histograms, different_bins
from gankern.metrics.extractors import Extractor, Features, load, train_classifier, trained
from gankern.metrics.features import frechet_distance, inception_score, kernel_distance
from gankern.metrics.fidelity import luma, ms_ssim, psnr, ssim
from gankern.metrics.labels import (
    assignment_accuracy,
    label_accuracy,
    mutual_information_bound,
    within_class_diversity,
    within_class_similarity,
)
from gankern.metrics.modes import ModeCoverage, mode_coverage
from gankern.metrics.nearest import Nearest, beside_nearest, memorisation, nearest_examples
from gankern.metrics.parzen import choose_sigma, parzen_log_likelihood
from gankern.metrics.scores import image_figures, precision_recall
from gankern.metrics.swd import laplacian_pyramid, laplacian_swd, sliced_wasserstein
from gankern.metrics.transport import earth_movers_distance, wasserstein_estimate

__all__ = [
    "DifferentBins",
    "Extractor",
    "Features",
    "ModeCoverage",
    "Nearest",
    "assignment_accuracy",
    "beside_nearest",
    "choose_sigma",
    "compare_histograms",
    "different_bins",
    "earth_movers_distance",
    "frechet_distance",
    "image_figures",
    "inception_score",
    "kernel_distance",
    "label_accuracy",
    "laplacian_pyramid",
    "laplacian_swd",
    "load",
    "luma",
    "memorisation",
    "mode_coverage",
    "ms_ssim",
    "mutual_information_bound",
    "nearest_examples",
    "parzen_log_likelihood",
    "precision_recall",
    "psnr",
    "sliced_wasserstein",
    "ssim",
    "train_classifier",
    "trained",
    "wasserstein_estimate",
    "within_class_diversity",
    "within_class_similarity",
]
