"""The public names, by the module that each lives in: for type checkers, and for __init__.py, which reads this file."""

from . import draw as draw
from .editor import Boxes as Boxes
from .guidance.edits import (
    attention_injection as attention_injection,
    bounded_attention as bounded_attention,
    dense_diffusion as dense_diffusion,
    forward_guidance as forward_guidance,
    regional_prompting as regional_prompting,
    reweight as reweight,
)
from .guidance.guide import Guidance as Guidance
from .guidance.image_prompt import ImagePrompt as ImagePrompt
from .guidance.layout import Layout as Layout
from .guidance.lines import (
    Curve as Curve,
    Point as Point,
    Stroke as Stroke,
)
from .guidance.objectives import (
    Objective as Objective,
    Settings as Settings,
    objective as objective,
)
from .guidance.objectives.attend_and_excite import attend_and_excite_loss as attend_and_excite_loss
from .guidance.objectives.bounded_attention import bounded_attention_loss as bounded_attention_loss
from .guidance.objectives.boxdiff import boxdiff_loss as boxdiff_loss
from .guidance.objectives.conform import conform_loss as conform_loss
from .guidance.objectives.extent import extent_loss as extent_loss
from .guidance.objectives.ilgd import ilgd_loss as ilgd_loss
from .guidance.objectives.initno import initno_loss as initno_loss
from .guidance.objectives.inside import inside_loss as inside_loss
from .guidance.objectives.layout import layout_loss as layout_loss
from .guidance.objectives.refocusing import refocusing_loss as refocusing_loss
from .guidance.objectives.relation import relation_loss as relation_loss
from .guidance.objectives.rnb import rnb_loss as rnb_loss
from .guidance.objectives.self_cross import self_cross_loss as self_cross_loss
from .guidance.objectives.self_refocusing import self_refocusing_loss as self_refocusing_loss
from .guidance.objectives.tradiffusion import tradiffusion_loss as tradiffusion_loss
from .guidance.objectives.winwinlay import winwinlay_loss as winwinlay_loss
from .guidance.pairs import (
    masactrl as masactrl,
    prompt_to_prompt as prompt_to_prompt,
)
from .guidance.regions import Region as Region
from .guidance.report import Report as Report
from .guidance.stretch import UsualSizes as UsualSizes
from .inversion import invert as invert
from .looking import look as look
from .model import (
    Adapter as Adapter,
    Model as Model,
    sites as sites,
)
from .networks.attention import (
    ALL as ALL,
    BOX_MASS as BOX_MASS,
    COLUMNS as COLUMNS,
    HEAD_MEAN as HEAD_MEAN,
    Edit as Edit,
    Keep as Keep,
    Record as Record,
)
from .networks.region_sums import REGION_SUMS as REGION_SUMS
from .networks.sites import (
    Site as Site,
    at_most as at_most,
    block as block,
    cross as cross,
    level as level,
    place as place,
    self_ as self_,
)
from .png.read import (
    Metadata as Metadata,
    read_metadata as read_metadata,
    read_parameters as read_parameters,
)
from .recorded import (
    LAST as LAST,
    MEAN as MEAN,
    PER_STEP as PER_STEP,
    Attention as Attention,
)
from .request import Request as Request
from .result import Result as Result
from .run import (
    Run as Run,
    Step as Step,
    generate as generate,
    sample_steps as sample_steps,
)
from .sampling import (
    DDIM as DDIM,
    DEIS as DEIS,
    LCM as LCM,
    LMS as LMS,
    PNDM as PNDM,
    TCD as TCD,
    DPMpp2M as DPMpp2M,
    Euler as Euler,
    EulerAncestral as EulerAncestral,
    UniPC as UniPC,
)
from .start_noise import initno as initno
from .weights.image_prompt import with_image_prompt as with_image_prompt
from .weights.load import load as load
from .weights.lora import (
    LoRA as LoRA,
    with_loras as with_loras,
)
from .weights.words import with_words as with_words

__version__: str
from .speed.replace import with_weights as with_weights
