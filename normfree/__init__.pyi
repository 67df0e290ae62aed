from normfree import errors as errors
from normfree.calibration import calibrate as calibrate
from normfree.checkpoint import load as load
from normfree.checkpoint import save as save
from normfree.conversion import convert as convert
from normfree.conversion import convert_ as convert_
from normfree.exporting import export as export
from normfree.fusing import fuse as fuse
from normfree.layers import SkipInit as SkipInit
from normfree.norms import Norm as Norm
from normfree.norms import register_norm as register_norm
from normfree.optim import clip_grad as clip_grad
from normfree.optim import param_groups as param_groups
from normfree.planning import plan as plan
from normfree.plans import Plan as Plan
from normfree.propagation import Signals as Signals
from normfree.propagation import signals as signals
from normfree.restoring import restore as restore
from normfree.verifying import Report as Report
from normfree.verifying import verify as verify

__version__: str
