from normfree import errors as errors
from normfree.checkpoint import load as load
from normfree.checkpoint import save as save
from normfree.conversion import convert as convert
from normfree.conversion import convert_ as convert_
from normfree.deployment.export import export as export
from normfree.deployment.fuse import fuse as fuse
from normfree.deployment.restore import restore as restore
from normfree.layers import SkipInit as SkipInit
from normfree.norms import Norm as Norm
from normfree.norms import register_norm as register_norm
from normfree.planning.plan import plan as plan
from normfree.plans import Plan as Plan
from normfree.proofs.verify import Report as Report
from normfree.proofs.verify import verify as verify
from normfree.training.calibration import calibrate as calibrate
from normfree.training.optim import clip_grad as clip_grad
from normfree.training.optim import param_groups as param_groups
from normfree.training.signals import Signals as Signals
from normfree.training.signals import signals as signals
from normfree.training.watching import watch as watch

__version__: str
