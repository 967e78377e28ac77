"""Fourier analysis of an encoder's feature maps, as the paper's Figure 3. `sgmim-fast fourier` is its command.

`spectrum`: relative log amplitudes of maps · `blocks`: of every block of a timm encoder · `encoders`: what a command
line names as one · `figure`: figure and CSV · `command`: the command.
"""

from sgmim_fast.fourier.blocks import block_spectra
from sgmim_fast.fourier.spectrum import Spectrum, relative_log_amplitude

__all__ = ["Spectrum", "block_spectra", "relative_log_amplitude"]
