"""The tangent form as Dynamo sees it: one region of the graph, which it does not look into. Imported by what it traces,
since importing Dynamo takes seconds."""

import torch._dynamo

from gankern.tangent import passes

penalty_gradients = torch._dynamo.nonstrict_trace(passes.run)
