"""Fourier analysis of an encoder's feature maps, as in the paper's Figure 3. Its command is `sgmim-fast fourier`.

`spectrum`: relative log amplitudes of feature maps · `blocks`: spectra of the blocks of a timm encoder · `encoders`:
loading encoders by name or file · `figure`: figure and CSV · `command`: the command.
"""

from sgmim_fast.fourier.blocks import block_spectra
from sgmim_fast.fourier.spectrum import Spectrum, relative_log_amplitude

__all__ = ["Spectrum", "block_spectra", "relative_log_amplitude"]
