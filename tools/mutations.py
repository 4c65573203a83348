"""Do the tests bite? Changes the numerical core in one place at a time and runs the tests that should notice.

    nice python tools/mutations.py            # all of them, an hour or so on one core
    nice python tools/mutations.py rounding.py "no re-fit"  # those of a file, or by a part of their names
    python tools/mutations.py --check         # only whether every text of the table is still there, once
    python tools/mutations.py --report docs/mutations.md LOG ...  # what such runs printed, in one table; later logs win

A change is made in a temporary copy of the tree, never here. Prints every change with `killed` or `SURVIVED`; exits
with 1 if one survived that is not marked as equivalent, with 2 if the table is out of date or the tests fail as they
are. A change whose tests run out of time counts as killed: none of them is slow otherwise.
"""

import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # of computing, whatever else runs on the machine

TESTS = {  # files of tests that should notice a change of a file of the source, or a folder of them; quick ones first
    "maths/roots.py": "linalg roots",
    "maths/decompose.py": "linalg maths/ storage/",
    "maths/rounding.py": "quantize",
    "maths/rotation.py": "rotation rotated",
    "maths/sums.py": "sums metric",
    "experts.py": "experts",
    "plan/teams.py": "mixtures_compressed",
    "maths/pivots.py": "pivots",
    "maths/closed_form.py": "compensate storage/",
    "maths/alternating.py": "adacomp",
    "maths/removal.py": "removal",
    "storage/problem.py": "storage/ plan/",
    "storage/narrow.py": "narrow storage/",
    "storage/integers.py": "storage/ plan/",
    "storage/low_rank.py": "storage/ plan/",
    "storage/integer_factors.py": "storage/ plan/",
    "storage/integers_and_factors.py": "storage/ plan/",
    "storage/packed.py": "packed cpu",
    "kernels/bits.py": "bits packed",
    "kernels/cpu.py": "cpu",
    "kernels/cuda.py": "cuda grouped",
    "kernels/grouped.py": "grouped",
    "storage/layers.py": "layers pivots storage/",
    "storage/embedding.py": "embedding_tables",
    "pipeline/tables.py": "embedding_tables",
    "pipeline/budget.py": "embedding_tables budget",
    "recipe.py": "recipe storage/ plan/",
    "plan/options.py": "plan/",
    "plan/rules.py": "plan/",
    "plan/spend.py": "spend plan/",
    "plan/maker.py": "compensate_integers plan/ record mixtures_compressed",
    "plan/units.py": "units narrow",
    "plan/plan.py": "plan",
    "plan/sensitivity.py": "sensitivity",
    "plan/importance.py": "adacr",
    "metrics/metric.py": "metric global_sigma",
    "metrics/curvature.py": "curvature curvature_plans",
    "metrics/spectra.py": "global_sigma cache_keys pipeline",
    "calibrate/moments.py": "forms curvature calibrate",
    "calibrate/forms.py": "forms",
    "calibrate/gradients.py": "curvature calibrate groups",
    "calibrate/groups.py": "groups",
    "calibrate/relay.py": "relay",
    "disk/shelf.py": "shelf relay",
    "calibrate/memory.py": "groups",
    "tune/numbers.py": "tune",
    "tune/run.py": "tune",
    "compensate/batches.py": "compensate::test_every_linear_is_the_best_for_what_the_layers_before_it_became",
    "compensate/refine.py": "cache_keys compensate::test_refined_blocks_are_nearer_to_the_dense_ones",
    "compensate/run.py": "compensate_integers",
    "compensate/units.py": "walk_stored",
    "pipeline/stages.py": "pipeline record made_once",
    "pipeline/losses.py": "pipeline record",
    "pipeline/measured.py": "measured",
}


@dataclass(frozen=True)
class Mutation:
    """One change: `old` stands once in `file` (under src/spectrim) and becomes `new`.

    `equivalent` is why no test can notice it, for changes that are kept as a record of that.
    """

    name: str
    file: str
    old: str
    new: str
    equivalent: str | None = None


M = Mutation
MUTATIONS = [
    # linalg
    M("rotation of blocks apart from signs", "maths/rotation.py", "(hadamard(BLOCK) * signs).float()", "hadamard(BLOCK).float()"),
    M("rotated metric of one side", "maths/rotation.py", "rows.copy_(R @ rows)", "rows.copy_(rows)"),
    M("rotation back is the rotation", "maths/rotation.py", "return _by_blocks(W, None, back=True)", "return _by_blocks(W, None, back=False)"),
    M("weights of inputs that are not rotated", "storage/problem.py", "self._weights(on_grid(self.C, grid), ", "self._weights(self.C, "),
    M("rotated where it pays nothing", "storage/problem.py", "rotated < _WORTH * plain", "rotated < plain"),
    M("inputs not rotated", "storage/packed.py", "return turned(input) if self.grid.rotated else input", "return input"),
    M("experts not rotated", "kernels/grouped.py", "linears[mine[0]].read(taken), [", "taken, ["),
    M("rotated experts beside others", "kernels/grouped.py", "kind = layout.config, linear.grid.rotated", "kind = layout.config, False"),
    M("rotation of a tracer is kept", "maths/rotation.py", "elif R is None and isinstance(blocks, FakeTensor):", "elif False:"),
    M("finite: only NaN", "maths/roots.py", "all(bool(end.isfinite()) for", "not any(bool(end.isnan()) for"),
    M("moments of all experts are one", "calibrate/groups.py", "readers = f\"{x.name.rpartition('.')[0]}.{_TOGETHER[x.role]}\" if", "readers = _TOGETHER[x.role] if"),
    M("blocks of experts are what all read", "experts.py", "_one(module, known, number, x.where(hit, others)) * hit", "_one(module, known, number, x)"),
    M("experts of a block are one list", "plan/teams.py", "(x.experts, x.role,", "(x.block, x.role,"),
    M("options of experts alike or not", "plan/maker.py", "exclude={\"embeddings\"}", "exclude={\"embeddings\", \"experts\"}"),
    M("sums of the other modality unweighed", "maths/sums.py", "(mean[:, :start].T, alpha=weight)", "(mean[:, :start].T)"),
    M("eigenvalues ascending", "maths/roots.py", "values.flip(0).clamp_min(0), vectors.flip(1)", "values.clamp_min(0), vectors"),
    M("eigenvalues not clamped", "maths/roots.py", "return values.flip(0).clamp_min(0), vectors.flip(1)", "return values.flip(0), vectors.flip(1)"),
    M("root without a square root", "maths/roots.py", "vectors[:, :rank] * values[:rank].sqrt()", "vectors[:, :rank] * values[:rank]"),
    M("root of full rank", "maths/roots.py", "rank = int((values > _ROUNDING * values[0]).sum())", "rank = len(values)"),
    M("block root transposed", "maths/roots.py", "return (self._factor.mT @ self._split(X)).reshape(X.shape)", "return (self._factor @ self._split(X)).reshape(X.shape)"),
    M("block solve with the transpose", "maths/roots.py", "torch.linalg.solve_triangular(self._factor.mT, self._split(X), upper=True)", "torch.linalg.solve_triangular(self._factor, self._split(X), upper=False)"),
    M("one failed block is enough", "maths/roots.py", "if bool(failed.any()):", "if bool(failed.all()):"),
    M("low-rank root without its rank", "maths/roots.py", "return Q, (1 + S.square()).sqrt()[:, None]", "return Q, (1 + 0 * S).sqrt()[:, None]"),
    M("low-rank gain of S", "maths/roots.py", "return Q, (1 + S.square()).sqrt()[:, None]", "return Q, (1 + S).sqrt()[:, None]"),
    M("low-rank metric without V", "maths/roots.py", "return self._d * X + self._V @ (self._V.T @ X)", "return self._d * X"),
    M("low-rank inverse gain", "maths/roots.py", "self._stretch(X, -1) / self._d.sqrt()", "self._stretch(X, 1) / self._d.sqrt()"),
    M("nystrom keeps rounding", "maths/roots.py", "kept = values > _NYSTROM_ROUNDING * values[-1].clamp_min(0)", "kept = values > 0"),
    M("nystrom without a root", "maths/roots.py", "vectors[:, kept] / values[kept].sqrt()", "vectors[:, kept] / values[kept]"),
    M("diagonal metric squared", "maths/roots.py", "return X * metric if metric.ndim == 1 else X @ metric", "return X * metric**2 if metric.ndim == 1 else X @ metric"),
    M("unseen directions as they come", "maths/roots.py", "U = torch.cat([U[:, :seen], U[:, seen:] @ V], dim=1)", "U = torch.cat([U[:, :seen], U[:, seen:]], dim=1)"),
    M("unseen values kept", "maths/roots.py", "return torch.where(torch.arange(len(s), device=s.device) < seen, s, 0.0), U", "return s, U"),
    M("right basis: diagonal without a root", "maths/roots.py", "else metric.clamp_min(0).sqrt() if metric.ndim == 1", "else metric.clamp_min(0) if metric.ndim == 1"),
    M("right basis: no rest", "maths/roots.py", "if seen < size:\n        # What", "if False:\n        # What"),
    M("right basis: rounding is a rest", "maths/roots.py", "if 0 < int(failed) <= seen:", "if int(failed):"),
    M("right basis: rest not orthogonal", "maths/roots.py", "torch.cat([Z, unseen - Z @ (Y.T @ unseen)], dim=1)", "torch.cat([Z, unseen], dim=1)", equivalent="the Cholesky factor of the next step orthonormalises; the projection spares it an ill condition"),
    # decompose
    M("Q is P", "maths/decompose.py", "P, Q = G.solve(U), G.transposed_times(U)", "P, Q = G.solve(U), G.solve(U)"),
    M("tall: output metric forgotten", "maths/decompose.py", "W.T @ (W if G is None else G.metric_times(W))", "W.T @ W"),
    M("values split unevenly", "maths/decompose.py", "split = torch.where(s > 0, s.sqrt(), norms).sqrt()", "split = torch.where(s > 0, s.sqrt(), norms)"),
    M("dead factors are divided by zero", "maths/decompose.py", "torch.where(split > 0, split, torch.ones_like(split)).to(A.dtype)", "split.to(A.dtype)"),
    M("heads: nobody is first", "maths/decompose.py", "urgent[:, 0] = torch.inf", "urgent[:, 0] = urgent[:, 0]"),
    M("heads by energy, not by loss", "maths/decompose.py", "urgent = (s if loss is None else loss)", "urgent = s"),
    M("nats of the first head", "maths/decompose.py", "output.nats[number].to(s.device) * s", "output.nats[0].to(s.device) * s"),
    # quantize
    M("codes not clamped", "maths/rounding.py", ".round() + offset).clamp(self.low, self.high)", ".round() + offset)"),
    M("codes truncated", "maths/rounding.py", "return ((x / step).round() + offset)", "return ((x / step).trunc() + offset)"),
    M("one code less", "maths/rounding.py", "return -(1 << self.bits - 1)", "return 1 - (1 << self.bits - 1)"),
    M("bytes without zero points", "maths/rounding.py", "return 4 * (words + zeros) + out * groups", "return 4 * words + out * groups"),
    M("no range search", "maths/rounding.py", "itertools.product(torch.linspace(*(_FED if fed else _ALONE), _RANGES).tolist(), signs)", "itertools.product([1.0], signs)"),
    M("the first of the ranges tried together", "maths/rounding.py", "cost, first = cost.min(0, keepdim=True)", "cost, first = cost[:1], (0 * cost[:1]).long()"),
    M("ranges without weights", "maths/rounding.py", "cost = (residual.square_() * weights).sum(-1, keepdim=True)", "cost = residual.square_().sum(-1, keepdim=True)"),
    M("scale of zeros", "maths/rounding.py", "step = torch.where(step > 0, step, torch.ones_like(step))", "step = step * 1"),
    M("scales not rounded first", "maths/rounding.py", "step = ((high - low) * shrink / levels).to(dtype).double()", "step = ((high - low) * shrink / levels).double()"),
    M("nothing is fed on", "maths/rounding.py", "target += inside[j, :j] @ errors[:j]", "target += 0 * inside[j, :j] @ errors[:j]"),
    M("blocks do not hear of each other", "maths/rounding.py", "carried = T[:start, block].T @ E[:start]", "carried = 0 * (T[:start, block].T @ E[:start])"),
    M("waves: nothing from the left", "maths/rounding.py", "carried = carried + (E[:, i] * T[:, j]).sum(2)", "carried = carried + 0"),
    M("waves: E in place of E + c", "maths/rounding.py", "(code, residual, residual + carried)", "(code, residual, residual)"),
    M("tiles: nothing from above", "maths/rounding.py", "above.append(_products(", "above.append(0 * _products("),
    M("no damping", "maths/rounding.py", "M.diagonal().add_(damping * M.diagonal().mean()", "M.diagonal().add_(0 * M.diagonal().mean()"),
    M("order as it comes", "maths/rounding.py", "order = M.diagonal().argsort(descending=True)", "order = M.diagonal().argsort(descending=False)"),
    M("weights in the wrong order", "maths/rounding.py", "weights[last] = lower.diagonal().square()", "weights[:] = lower.diagonal().square()"),
    M("groups that do not divide", "maths/rounding.py", "return group if group is not None and size % group == 0 else None", "return group"),
    # pivots
    M("no swaps", "maths/pivots.py", "if not bool((high > bound).any()):", "if True:"),
    M("rows not in order", "maths/pivots.py", "return p, X[others.argsort()][:, columns], A[p] @ B", "return p, X[:, columns], A[p] @ B"),
    M("columns not in order", "maths/pivots.py", "return p, X[others.argsort()][:, columns], A[p] @ B", "return p, X[others.argsort()], A[p] @ B"),
    M("swap without its correction", "maths/pivots.py", "torch.linalg.solve(R[:, J], R - E), alpha=-1)", "torch.linalg.solve(R[:, J], R - E), alpha=0)"),
    M("one swap at a time", "maths/pivots.py", "while len(swaps) < min(S.shape):", "while len(swaps) < 1:", equivalent="swaps that are left over are found in the next round: slower, the same bound"),
    M("repeated pivots pass", "maths/pivots.py", "if int(free.sum()) != out - len(p):", "if False:"),
    # forms of storage
    M("others not fitted again", "maths/removal.py", "for M in (V, GV, P):", "for M in (P,):"),
    M("the inverse of before", "maths/removal.py", "for M in (V, GV, P):", "for M in (V, GV):"),
    M("rest not carried over", "maths/removal.py", "return W[:, kept] + solved(times_metric(rest, C)[:, kept], factor)", "return W[:, kept]"),
    M("what is gone goes again", "maths/removal.py", "costs.where(alive, torch.inf)", "costs"),
    M("rest cut out of the inverse alone", "maths/removal.py", "P[rest[:, None], rest], alive[rest]", "P[: len(rest), : len(rest)], alive[rest]"),
    M("outputs that nobody reads count", "storage/narrow.py", "return torch.zeros_like(found).index_copy(0, unit, found[unit])", "return found"),
    M("rows of the whole weigh", "storage/narrow.py", "by_row[bits][kept] * few.output_weights", "by_row[bits][kept] * problem.output_weights[kept]"),
    M("missing units cost nothing beside integers", "storage/narrow.py", "float(error[units - count]) + float(each.sum())", "float(each.sum())"),
    M("units mixed by a norm", "plan/units.py", "if any(id(p) not in inside for p in model.get_submodule(home).parameters()):", "if False:"),
    M("units left out that are read", "plan/units.py", "self.menus |= {name: _as_wide(menus[name])", "self.menus |= {name: menus[name]"),
    M("hulls not merged", "plan/units.py", 'order = np.argsort(-np.concatenate(steps), kind="stable")', "order = np.arange(len(owner))"),
    M("what is left without losses", "storage/problem.py", "each = self.spectrum.s if self.spectrum.loss is None else self.spectrum.loss", "each = self.spectrum.s"),
    M("what is kept, not what is left", "storage/problem.py", "each.flip(0).cumsum(0).flip(0).cpu().numpy(), 0.0)", "each.cumsum(0).cpu().numpy(), 0.0)"),
    M("residuals as if nothing were fed on", "storage/problem.py", "if M is None or M.ndim == 1 or damping is not None:", "if M is None or M.ndim == 1:"),
    M("integers for all roles", "recipe.py", "return self.bits is not None and (self.roles == \"all\" or role in FEED_FORWARD)", "return self.bits is not None"),
    M("rounding ignores the outputs", "storage/integers.py", "return quantize(W, grid, C, G, dtype=dtype, damping", "return quantize(W, grid, C, None, dtype=dtype, damping"),
    M("nearest in the metric", "storage/integers.py", "return quantize(W, grid, dtype=dtype, signed=signed)", "return quantize(W, grid, C, G, dtype=dtype, signed=signed)"),
    M("one dampening for few samples and many", "recipe.py", "_LEAST_DAMPING + _DAMPING_BY_NOISE * noise", "_LEAST_DAMPING"),
    M("labels do not count", "metrics/metric.py", "min(n, read.labels(linear.name, m) or n)", "n"),
    M("images weigh as much for any expert", "metrics/metric.py", "    part = _leaned(part, linear, read)\n    return _as_noisy", "    return _as_noisy"),
    M("refitted columns without dampening", "storage/problem.py", "return max(DAMPING, min(1.0, _RIDGE * size / positions)) if positions else DAMPING", "return DAMPING"),
    M("dampened once", "maths/removal.py", "_TRIES = 5", "_TRIES = 1"),
    M("mixed units are taken", "plan/units.py", "return len(seen) != 2 or not torch.equal(seen[0][..., half:], seen[1][..., half:])", "return False"),
    M("a diagonal of rotated inputs", "maths/rounding.py", "return turned_metric(C.diag() if C.ndim == 1 else C)", "return turned_metric(C) if C.ndim > 1 else C"),
    M("steps that are not finite are kept", "tune/run.py", "gains = all(map(isfinite, now.values())) and _score(now, best) < 0", "gains = not _score(now, best) >= 0"),
    M("any dampening", "recipe.py", "return min(_MOST_DAMPING, ", "return max(0.0, "),
    M("images are as many as text", "metrics/metric.py", "return (1 + weight) ** 2 / (1 / text + weight**2 / image)", "return (1 + weight) ** 2 / (1 / text + weight**2 / text)"),
    M("outputs dampened as inputs", "storage/problem.py", "else (inputs, outputs)", "else (inputs, inputs)"),
    M("options dampened as without samples", "plan/maker.py", "            positions=positions_behind(part, linear, self._statistics),\n", ""),
    M("compensated weights dampened as without samples", "compensate/run.py", ", units=units, positions=seen)", ", units=units)"),
    M("one scale for all inputs", "storage/problem.py", "fitting_group(size, self.quantize.group), self.quantize.symmetric, rotated)", "None, self.quantize.symmetric, rotated)"),
    M("pivots are not priced", "storage/low_rank.py", "if problem.storage.pivoted and heads == 1:", "if False:"),
    M("pivots pay where they are equal", "storage/low_rank.py", "pivoted = (by_pivots < sizes)", "pivoted = (by_pivots <= sizes)"),
    M("pivot indices cost nothing", "storage/low_rank.py", "* linear.dtype.itemsize + pivoted * PIVOT * count", "* linear.dtype.itemsize"),
    M("heads pay for all outputs", "storage/low_rank.py", "count * (linear.in_features + linear.out_features // heads - pivoted * count)", "count * (linear.in_features + linear.out_features - pivoted * count)"),
    M("multiple ignored by floats", "storage/low_rank.py", "step = problem.storage.multiple if heads == 1 else 1", "step = 1"),
    M("multiples by head", "storage/low_rank.py", "step = problem.storage.multiple if heads == 1 else 1", "step = problem.storage.multiple"),
    M("one direction for all heads", "storage/low_rank.py", "counts = np.arange(step if heads == 1 else heads, most + 1, step)", "counts = np.arange(step, most + 1, step)"),
    M("ranks up to the larger side", "storage/low_rank.py", "(most := min(size, out // len(ranks)))", "(most := max(size, out // len(ranks)))"),
    M("numbers of heads are not compared", "storage/low_rank.py", "if not isinstance(rank, int) and len(rank) != linear.per_head:", "if False:"),
    M("a rest costs nothing", "storage/low_rank.py", "({\"R\": (out, size)} if \"R\" in grids else {})", "{}"),
    M("heads fitted without their metric", "storage/low_rank.py", "roots = (None,) * len(ranks) if problem.output is None else problem.output.roots", "roots = (None,) * len(ranks)"),
    M("no re-fit", "storage/integer_factors.py", "for X in (A, refit(W, A, B, C))]", "for X in (A,)]"),
    M("always the re-fit", "storage/integer_factors.py", "for X in (A, refit(W, A, B, C))]", "for X in (refit(W, A, B, C),)]"),
    M("A rounded in the identity", "storage/integer_factors.py", "rounded(problem, X, layer.A.grid, gram(B, C), G, narrow)", "rounded(problem, X, layer.A.grid, gram(B, None), G, narrow)"),
    M("A rounded without the outputs", "storage/integer_factors.py", "rounded(problem, X, layer.A.grid, gram(B, C), G, narrow)", "rounded(problem, X, layer.A.grid, gram(B, C), None, narrow)"),
    M("scales of factors in float16", "storage/integer_factors.py", "narrow = torch.bfloat16 if problem.linear.dtype == torch.float16 else problem.linear.dtype", "narrow = problem.linear.dtype"),
    M("scales not balanced", "storage/integer_factors.py", "return ((least[0] - least[1]) / 2).nan_to_num", "return (0 * (least[0] - least[1])).nan_to_num"),
    M("scales balanced one way", "storage/integer_factors.py", "return ((least[0] - least[1]) / 2).nan_to_num", "return (least[0] - least[1]).nan_to_num"),
    M("rounding of factors costs nothing", "storage/integer_factors.py", "float(problem.left[count]) + added[count - 1]", "float(problem.left[count])"),
    M("energy of B without the metric", "storage/integer_factors.py", "energy = (times_metric(B, problem.C) * B).sum(1)", "energy = (B * B).sum(1)"),
    M("gain of A without the metric", "storage/integer_factors.py", "gain = (times_metric(A.T, problem.G) * A.T).sum(1)", "gain = (A.T * A.T).sum(1)"),
    M("multiple ignored by integers", "storage/integer_factors.py", "    step = -(-step // multiple) * multiple\n", ""),
    M("factors of the whole weight", "storage/integers_and_factors.py", "W = problem.W.double() - whole.dense()", "W = problem.W.double()"),
    M("factors beside integers take nothing", "storage/integers_and_factors.py", "float(each.sum()) - removed[count - 1]", "float(each.sum())"),
    M("float factors not balanced", "storage/integers_and_factors.py", "power = balance(*(size.where(size > 0, torch.nan) for size in sizes))  # [k]", "power = torch.ones(rank, dtype=W.dtype)"),
    M("re-fit without the metric", "maths/closed_form.py", "return A + times_metric(W - A @ B, C) @ B.T", "return A + (W - A @ B) @ B.T"),
    # options, rules and what is spent
    M("options as large as the weight", "plan/options.py", "kept = np.flatnonzero(part.bytes < dense)", "kept = np.arange(len(part.bytes))"),
    M("no option at all", "plan/options.py", "if not any(len(part.bytes) for part in found):", "if False:"),
    M("options of any linear", "plan/options.py", "f\"{kept.parent.name}/{problem.linear.name}\"", "kept.parent.name"),
    M("options are not kept", "plan/options.py", "if kept is not None and parts:", "if False:"),
    M("options of any recipe", "plan/maker.py", "for part in (recipe.stored, recipe.quantize)]", "for part in (recipe.stored,)]"),
    M("options of any multiple", "plan/maker.py", "for part in (recipe.stored, recipe.quantize)]", "for part in (recipe.quantize,)]"),
    M("energy of all layers in one unit", "plan/rules.py", "return Curve(menu.bytes, menu.error / max(float(menu.left[0]), 1e-300))", "return Curve(menu.bytes, menu.error)"),
    M("uniform by cost", "plan/rules.py", "return Curve(menu.bytes, menu.error, reach)", "return Curve(menu.bytes, menu.error)"),
    M("adacr without its floor", "plan/rules.py", "reach = np.where(reach <= part.floor, reach, line)", "reach = line"),
    M("adacr without its importance", "plan/rules.py", "line = part.floor + (reach - part.floor) / max(wanted, 1e-6)", "line = reach"),
    M("thresholds on no direction", "plan/rules.py", "smaller = menu.error[(menu.bytes < linear.nbytes) & (menu.error > 0)]", "smaller = menu.error[menu.error < 0]"),
    M("what is left is not spent", "plan/spend.py", "    _fill(curves, at, left)\n", "    _fill(curves, at, 0)\n"),
    M("one step too many", "plan/spend.py", "np.cumsum(price[order]), left, side=\"right\"))]", "np.cumsum(price[order]), left, side=\"right\")) + 1]"),
    M("one step too few", "plan/spend.py", "np.cumsum(price[order]), left, side=\"right\")", "np.cumsum(price[order]), left, side=\"left\")", equivalent="what is left then buys that very step"),
    M("hull keeps inner points", "plan/spend.py", "while len(hull) > 1:", "while False:"),
    M("dominated options stay", "plan/spend.py", "return order[np.append(True, least[1:] < least[:-1])]", "return order"),
    M("steps by their savings, not by the byte", "plan/spend.py", "scores = -np.diff(costs) / prices if self.reach is None else", "scores = -np.diff(costs) if self.reach is None else"),
    M("shares walk the hull", "plan/spend.py", "if self.reach is not None:\n            return np.arange(len(self.front))", "if False:\n            return np.arange(len(self.front))"),
    M("the first step that fits", "plan/spend.py", "best = int(scores.argmax())", "best = 0"),
    M("the largest step that fits", "plan/spend.py", "best = int(scores.argmax())", "best = len(scores) - 1"),
    M("left-overs are spent twice", "plan/spend.py", "            left -= price\n", "            left -= 0\n"),
    M("left-overs are not counted", "plan/spend.py", "left -= int(price[taken].sum())", "left -= 0"),
    M("kept directions for other heads", "plan/maker.py", "as_kept = heads is None or heads == spectrum.heads", "as_kept = True"),
    M("costs in the wrong unit", "pipeline/stages.py", "error = lost / max(float(menu.left[0]), 1e-300)", "error = lost"),
    M("the loss of the last linear alone", "pipeline/losses.py", "self.total[modality] += predicted_loss(", "self.total[modality] = predicted_loss("),
    M("compensated linears are made anew", "pipeline/stages.py", "tensors = solved[name] if name in solved else self.maker.make(", "tensors = self.maker.make("),
    M("the walk runs dense products", "compensate/units.py", "self.small[name] = filled(self.dense[name], row.form, row.spec, tensors)", "self.small[name] = filled(self.dense[name], row.form, row.spec, tensors).to_dense()"),
    # options, rules, spending
    M("dominated options", "plan/spend.py", "order[np.append(True, least[1:] < least[:-1])]", "order"),
    M("threshold: pivots at the price of all", "plan/rules.py", "    if menu.pivoted:\n", "    if False:\n"),
    M("threshold: dead heads hide the others", "plan/rules.py", "falling[menu.heads :] = np.minimum.accumulate(falling[menu.heads :])", "falling[:] = np.minimum.accumulate(falling)"),
    M("threshold: not by bytes", "plan/rules.py", "np.cumsum((falling * np.diff(sizes)[:last])[::-1])", "np.cumsum(falling[::-1])"),
    M("threshold: worth nothing is never bought", "plan/rules.py", "np.maximum(wanted[:last], 1e-30)", "wanted[:last].copy()"),
    # plan
    M("a table is looked up without its scales", "storage/embedding.py", "scale = self.weight_scale[ids]", "scale = self.weight_scale[ids * 0]"),
    M("a shared head reads rows", "storage/embedding.py", "return self._embedding[0].product_with(input)", "return 2 * self._embedding[0].product_with(input)"),
    M("tables cost nothing", "pipeline/tables.py", "nats = sum(weights[modality] * loss for", "nats = sum(0 * weights[modality] * loss for"),
    M("a table is counted dense", "pipeline/budget.py", "for linear in (*self._parts.linears, *self._parts.tables):", "for linear in self._parts.linears:"),
    M("rounded tables stay in the model", "pipeline/tables.py", "                    weight.copy_(original)\n", "                    pass\n"),
    M("strange linears pass", "plan/plan.py", "if strange := sorted((self.linears.keys() - known.keys()) | (self.tables.keys() - tables.keys())):", "if strange := []:"),
    M("doubled keys of a plan", "plan/plan.py", "content = parse_json(Path(path).read_bytes())", "content = json.loads(Path(path).read_bytes())"),
    M("words for numbers in a plan", "plan/plan.py", "json.dumps(content), strict=True)", "json.dumps(content))"),
    M("rows are looked at when a model is there", "plan/plan.py", "                    form(row.form).heads(row.spec)\n", "                    pass\n"),
    M("notes of another spec", "plan/plan.py", "rows[name] = plan_row(linear, row.form, row.spec)", "rows[name] = row"),
    # metric
    M("image sums not balanced", "metrics/metric.py", "return [1.0, gamma * (traces[0] / traces[1])]", "return [1.0, gamma]"),
    M("balance upside down", "metrics/metric.py", "gamma * (traces[0] / traces[1])", "gamma * (traces[1] / traces[0])"),
    M("sums in place of means", "metrics/metric.py", "joint = first.second.div_(first.count)", "joint = first.second"),
    M("means of modalities added", "metrics/metric.py", "/ sum(m.count for m in moments)", "/ moments[0].count"),
    M("alpha not doubled", "metrics/metric.py", "** (2 * part.alpha)", "** part.alpha"),
    M("unreached: always the identity", "metrics/metric.py", "if not moments and part.unreached == \"image\" and \"image\" in gathered:", "if False:"),
    M("sums: positions of text for all", "metrics/metric.py", "read.positions(name, \"image\" if source == \"image\" else \"text\")", "read.positions(name, \"text\") or 1"),
    # curvature
    M("low-rank part of the loss", "metrics/curvature.py", "GD = diagonal[:, None] * D + V @ (V.T @ D)", "GD = diagonal[:, None] * D"),
    M("diagonal part of the loss", "metrics/curvature.py", "GD = diagonal[:, None] * D + V @ (V.T @ D)", "GD = V @ (V.T @ D)"),
    M("no half", "metrics/curvature.py", "return (0.5 * correction * gradients / output.labels * energy)", "return (1.0 * correction * gradients / output.labels * energy)"),
    M("by position, not by label", "metrics/curvature.py", "gradients / output.labels * energy", "gradients / output.count * energy"),
    M("eta by token for sequence", "metrics/curvature.py", "\"token\": token, \"sequence\": sequence}[eta]", "\"token\": token, \"sequence\": token}[eta]"),
    M("images at no price", "metrics/curvature.py", "losses = [price * predicted_trace", "losses = [predicted_trace"),
    M("output metric not damped", "metrics/curvature.py", "        blocks.diagonal(dim1=1, dim2=2).add_(damping)\n", ""),
    M("beta ignored", "metrics/curvature.py", "(part.beta * _trace(first) / _trace(output)", "(_trace(first) / _trace(output)"),
    M("nystrom beyond the diagonal", "metrics/curvature.py", "return (diagonal - V.square().sum(1)).clamp_min(0), V", "return diagonal, V"),
    M("nats left out of the dense metric", "maths/decompose.py", "nats * (eye() if root is None else root.dense())", "1.0 * (eye() if root is None else root.dense())"),
    # spectra
    M("heads in the order of all", "maths/decompose.py", "(head == number).nonzero()[:count, 0]", "(head >= number).nonzero()[:count, 0]"),
    M("spectra in float32", "metrics/spectra.py", "kept = torch.float64 if len(spectrum.P) < len(W) and spectrum.head is None else torch.float32", "kept = torch.float32"),
    M("key without the metric", "metrics/spectra.py", "content = [VERSION, metric.model_dump(mode=\"json\"), state,", "content = [VERSION, state,"),
    # probes
    M("losses not above the dense one", "plan/sensitivity.py", "losses.append(_loss(model, windows) - dense)", "losses.append(_loss(model, windows))"),
    M("losses not made monotone", "plan/sensitivity.py", "np.maximum.accumulate(curve[::-1])[::-1].copy()", "curve.copy()"),
    M("importance by linears, not bytes", "plan/importance.py", "sum(value * linear.nbytes for linear, value in raw.items()) / max(1, sum(linear.nbytes for linear in raw))", "sum(raw.values()) / max(1, len(raw))"),
    # calibrate
    M("|x| forgotten", "calibrate/moments.py", "total = x.abs().sum(0)  # [in]", "total = x.sum(0)  # [in]"),
    M("products in the dtype of the inputs", "maths/roots.py", "return x.to(torch.promote_types(x.dtype, torch.float32))", "return x"),
    M("sequences by the diagonal", "calibrate/moments.py", "return ((parts @ parts.transpose(1, 2)) * (x @ x.T)).sum((1, 2))", "return ((parts @ parts.transpose(1, 2)) * (x @ x.T)).diagonal(0, 1, 2).sum(1)"),
    M("sketch without its test", "calibrate/moments.py", "return g.T @ (g @ sketch_test(g.shape[1], self.form.size).to(g))", "return g.T @ g[:, : self.form.size]"),
    M("Fisher not squared", "calibrate/moments.py", "columns = gradient.square().sum(0)  # [in]", "columns = gradient.abs().sum(0)  # [in]"),
    M("Fisher not by label", "calibrate/gradients.py", "scales = [1 / count for count in labels] if fisher else None", "scales = [1.0 for count in labels] if fisher else None"),
    M("calls that repeat are apart", "calibrate/gradients.py", "if self._calls[linear.name] == 1:", "if True:"),
    M("mean loss", "calibrate/gradients.py", "into[where] = slope.to(into.dtype)", "into[where] = (slope / len(slope)).to(into.dtype)"),
    M("next token is this token", "calibrate/gradients.py", "where = sample.labelled.nonzero()[:, 0]\n", "where = sample.labelled.nonzero()[:, 0] + 1\n"),
    M("linears must lead somewhere", "calibrate/gradients.py", "if output.requires_grad or relay is None:", "if True:"),
    M("groups of what nothing reaches", "calibrate/groups.py", "if x.nbytes else x for x in several]", "for x in several]"),
    M("features that skip blocks forgotten", "calibrate/relay.py", "if not any(leaf in past and number < before for leaf, number in leaves.items()):", "if True:"),
    M("a pass hands nothing over", "calibrate/relay.py", "            if place != self._keep:\n", "            if True:\n"),
    M("gradients of another batch", "calibrate/relay.py", "self._shelves[place].put(key, gradient)", "self._shelves[place].put((0, key[1]), gradient)"),
    M("tensors over each other", "disk/shelf.py", "place = self._file.seek(0, 2) if at is None", "place = self._file.seek(0) if at is None"),
    M("groups above the limit", "calibrate/groups.py", "        room -= size\n", "        room -= 0\n"),
    M("scales without signs", "maths/rounding.py", "signs = (1, -1) if signed and grid.symmetric else (1,)", "signs = (1,)"),
    M("experts counted as all tokens", "calibrate/memory.py", "return min(1.0, chosen / experts)", "return 1.0"),
    M("no unit by tensor", "tune/numbers.py", "own = gradient.float() * (share * self.unit)", "own = gradient.float() * share"),
    M("mean is the last", "tune/numbers.py", "self.mean.lerp_(self.master.detach(), share)", "self.mean.copy_(self.master.detach())"),
    M("last state kept", "tune/run.py", "and _score(now, best) < 0", "and _score(now, best) < 9"),
    M("bytes of half the precision", "calibrate/forms.py", "return sum(8 * torch.Size(shape).numel()", "return sum(4 * torch.Size(shape).numel()"),
    # compensate
    M("drawn towards zero", "maths/closed_form.py", "return W + _ridge(cross - W @ second, second.clone(), damping)", "return _ridge(cross, second.clone(), damping)"),
    M("no ridge", "maths/closed_form.py", "ridge = damping * H.trace() / len(H)\n", "ridge = 1e-12 * H.trace() / len(H)\n"),
    M("ridge of the whole trace", "maths/closed_form.py", "ridge = damping * H.trace() / len(H)\n", "ridge = damping * H.trace()\n"),
    M("shares exchanged", "maths/closed_form.py", "return dense.lerp(second, weight), (W.double()", "return second.lerp(dense, weight), (W.double()"),
    M("positions not counted", "maths/closed_form.py", "+= product\n        self.count += len(x)", "+= product\n        self.count += 1"),
    M("no least weight", "maths/closed_form.py", "/ square, 0.0), 1.0)", "/ square, -9.0), 1.0)"),
    M("half a correction", "maths/closed_form.py", "W.double() @ H, H, damping) / half", "W.double() @ H, H, damping)"),
    M("left-out samples are fitted to", "compensate/batches.py", "if pair.left_out != left_out or", "if pair.left_out < left_out or"),
    M("B not fitted", "maths/alternating.py", "B = B + pseudo_inverse(A.T @ weighted) @ step", "B = B + 0 * pseudo_inverse(A.T @ weighted) @ step"),
    M("A not fitted", "maths/alternating.py", "A = A + (cross - A @ seen) @ B.T", "A = A + 0 * (cross - A @ seen) @ B.T"),
    M("adacomp without its output metric", "maths/alternating.py", "weighted = A if output is None else output.metric_times(A)", "weighted = A"),
    M("no unit diagonal", "maths/alternating.py", "scale = torch.where(diagonal > 0, diagonal.clamp_min(1e-300).rsqrt(), 0.0)", "scale = torch.ones_like(diagonal)"),
    M("refinement without its metric", "compensate/refine.py", "if output is not None:\n                    missing", "if False:\n                    missing"),
    M("refinement by the first batch", "compensate/refine.py", "number = step % len(samples)", "number = 0"),
    M("refinement on the dense stream", "compensate/refine.py", "missing = target - _rows(unit.run(call, small=True), counted, place)", "missing = target - _rows(unit.run(samples[step % len(samples)][0], small=True), counted, place)"),
    # layers
    M("zero points not subtracted", "storage/packed.py", "codes = codes - zero[..., None].to(scale.dtype)", "pass"),
    M("a table with the high bits first", "kernels/bits.py", "words >> _steps(size // bits, bits, words) &", "words >> _steps(size // bits, bits, words).flip(0) &"),
    M("4-bit halves swapped", "kernels/cpu.py", "codes[:, 0], codes[:, 1] = (signed << 4) >> 4, signed >> 4", "codes[:, 1], codes[:, 0] = (signed << 4) >> 4, signed >> 4"),
    M("planes in another order", "kernels/cpu.py", "high = planes[2] << 2 - quarter if quarter < 3 else planes[2] >> 1", "high = planes[2] << quarter if quarter < 3 else planes[2] >> 1"),
    M("offsets without their sign", "kernels/cpu.py", "pairs = [scale] if zero is None else [scale, -zero.to(scale.dtype) * scale]", "pairs = [scale] if zero is None else [scale, zero.to(scale.dtype) * scale]"),
    M("8-bit groups in float16 sums", "kernels/cpu.py", "y = y.float().sum(0)", "y = y[0].float()"),
    M("a stored layout", "storage/packed.py", "destination[f\"{prefix}weight_packed\"] = pack(self.codes(), self.grid.bits)", "pass"),
    M("rows of groups by the order of hits", "kernels/grouped.py", "for number in one.numbers]\n            y", "for number in mine]\n            y"),
    M("biases by the order of rows", "kernels/grouped.py", "biases.repeat_interleave(torch.tensor(sizes, device=y.device), 0, output_size=len(y))", "biases.repeat_interleave(torch.tensor(sizes[::-1], device=y.device), 0, output_size=len(y))"),
    M("a group is never out of date", "kernels/grouped.py", "layout.codes.data_ptr() == places[number]", "places"),
    M("products of a GPU untried", "kernels/cuda.py", "error < _TOLERANCE", "error < 1e9"),
    M("hooks of grouped experts unseen", "kernels/grouped.py", "not all(is_plain(linears[n], type(first)) for n in mine)", "not mine"),
    M("words high byte first", "kernels/bits.py", "joined = (eights << _steps(8, bits, eights)).sum(2, keepdim=True)", "joined = (eights << _steps(8, bits, eights).flip(0)).sum(2, keepdim=True)"),
    M("codes without their offset", "kernels/bits.py", "return (codes.flatten(1)[:, :count] - (1 << bits - 1)).to(dtype)", "return codes.flatten(1)[:, :count].to(dtype)"),
    M("zero points not written", "storage/packed.py", "self.weight_zero_point.copy_(pack(found.zero.T, self.grid.bits).T)", "pass"),
    M("rest forgotten in the layer", "storage/layers.py", "            y = y + self.R(input)\n", "            y = y + 0 * self.R(input)\n"),
    M("pivots and others exchanged", "storage/layers.py", "whole.index_copy_(-1, p, latent).index_copy_(-1, others, y)", "whole.index_copy_(-1, p, latent).index_copy_(-1, others.flip(0), y)"),
    M("bias forgotten", "storage/layers.py", "return y if self.bias is None else y + self.bias", "return y"),
    M("dense product in low precision", "storage/layers.py", "wide = torch.promote_types(B.dtype, torch.float32)\n", "wide = B.dtype\n"),
    M("rest forgotten in the weight", "storage/layers.py", "found = found + self.R.dense().to(wide)", "found = found + 0 * self.R.dense().to(wide)"),
    M("rows of the weight in the order of the outputs", "storage/layers.py", "torch.cat([B, found])[self.order.argsort()]", "torch.cat([B, found])[self.order]"),
    M("columns outside a head pass", "storage/layers.py", "if A.count_nonzero() != sum(block.count_nonzero() for block in blocks):", "if False:"),
]  # fmt: skip


def wrong() -> list[str]:
    """What of the table is out of date."""
    found = []
    for mutation in MUTATIONS:
        path = ROOT / "src" / "spectrim" / mutation.file
        count = path.read_text(encoding="utf-8").count(mutation.old) if path.exists() else 0
        if count != 1:
            found.append(f"{mutation.name!r}: {mutation.file} has its text {count} times")
    found += [f"{file}: no tests are named for it" for file in sorted({m.file for m in MUTATIONS} - TESTS.keys())]
    paths = sorted({test.partition("::")[0] for file in TESTS for test in _tests(file)})
    found += [f"{path} is missing" for path in paths if not (ROOT / path).exists()]
    names = [mutation.name for mutation in MUTATIONS]
    changes = [(mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS]
    return found + [
        f"{name!r} stands twice"
        for name, change in zip(names, changes, strict=True)
        if names.count(name) > 1 or changes.count(change) > 1
    ]


def _tests(file: str) -> list[str]:
    """Paths, or paths and the name of a test, as pytest takes them."""
    named = (name.partition("::") for name in TESTS[file].split())
    found = ((_test(name), *rest) for name, *rest in named)
    return [f"{path.relative_to(ROOT) if path.is_absolute() else path}{''.join(rest)}" for path, *rest in found]


def _test(name: str) -> Path:
    """A file of tests by the middle of its name, or a folder by its name and a slash."""
    tests = ROOT / "tests"
    return tests / name if name.endswith("/") else next(tests.rglob(f"test_{name}.py"), Path(name))


def run(tree: Path, tests: list[str]) -> tuple[bool, float]:
    """Whether tests pass on a tree, and the seconds they took; in a fork, so that libraries are imported once."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(10 * SECONDS)  # threads that wait for each other
            os.chdir(tree)
            sys.path.insert(0, str(tree / "src"))
            sys.dont_write_bytecode = True  # a file of the same size and second would be taken for the one before
            os.environ |= {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
            with (tree / "log").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            options = [
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                "-W",
                "ignore:Module already imported",
                "--hypothesis-seed=0",
            ]
            code = int(pytest.main([*options, *tests]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0, time.monotonic() - began


def report(logs: list[Path]) -> str:
    """A page of Markdown: by file of the source, what became of its changes in the runs that wrote the logs."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    equivalent = {(m.file, m.name): m.equivalent for m in MUTATIONS if m.equivalent is not None}
    for log in logs:
        day = f"{datetime.fromtimestamp(log.stat().st_mtime):%Y-%m-%d %H:%M}"
        lines = re.findall(
            r"^ *\d+ s  (killed|SURVIVED|equivalent .*?)  (\S+\.py): (.*)$", log.read_text(), re.MULTILINE
        )
        for verdict, *key in lines:
            passed = "equivalent" if tuple(key) in equivalent else "survived"
            found[tuple(key)] = ("killed" if verdict == "killed" else passed, day)
    rows, total = [], [0] * 5
    for file in TESTS:
        names = [m.name for m in MUTATIONS if m.file == file]
        run = [found[file, name] for name in names if (file, name) in found]
        verdicts = [verdict for verdict, _ in run]
        counts = [len(names), len(run), *map(verdicts.count, ("killed", "equivalent", "survived"))]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        rows.append([file, *counts, max((day for _, day in run), default="")])
    head = ["file", "changes", "run", "killed", "equivalent", "survived", "last run"]
    table = [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * 7, *rows, ["all", *total, ""])]
    survived = [f"{m.file}: {m.name}" for m in MUTATIONS if found.get((m.file, m.name), ("",))[0] == "survived"]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "hypothesis"))
    made = f"Written by `tools/mutations.py --report` with Python {platform.python_version()}, {versions}."
    reasons = [f"- {file}: {name}: {why}" for (file, name), why in equivalent.items()]
    parts = ["# Do the tests bite?", made, "\n".join(table), f"Survived: {'; '.join(survived) or 'none'}."]
    return "\n\n".join([*parts, "Equivalent, which no test can notice:", "\n".join(reasons)]) + "\n"


def main(words: list[str]) -> int:
    """Run the changes whose files or names hold one of the words, all without words; returns the exit code."""
    if problems := wrong():
        print("\n".join(problems))
        return 2
    if words == ["--check"]:
        return 0
    if words[:1] == ["--report"]:
        Path(words[1]).write_text(report([Path(log) for log in words[2:]]), encoding="utf-8")
        return 0
    chosen = [m for m in MUTATIONS if not words or any(word in f"{m.file}: {m.name}" for word in words)]
    survived = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        tree = Path(scratch)
        for name in ("src", "tests", "tools", "pyproject.toml"):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, tree / name)
        tried: set[str] = set()
        for mutation in chosen:
            if TESTS[mutation.file] not in tried:
                tried.add(TESTS[mutation.file])
                passed, seconds = run(tree, tests := _tests(mutation.file))
                print(f"{seconds:4.0f} s  unchanged: {'passed' if passed else 'FAILED'}  {' '.join(tests)}", flush=True)
                if not passed:
                    print((tree / "log").read_text()[-3000:])
                    return 2
            path = tree / "src" / "spectrim" / mutation.file
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            passed, seconds = run(tree, _tests(mutation.file))
            path.write_text(text, encoding="utf-8")
            verdict = (
                "killed" if not passed else f"equivalent ({mutation.equivalent})" if mutation.equivalent else "SURVIVED"
            )
            survived += [mutation.name] if verdict == "SURVIVED" else []
            print(f"{seconds:4.0f} s  {verdict}  {mutation.file}: {mutation.name}", flush=True)
    equivalent = sum(m.equivalent is not None for m in chosen)
    print(f"{len(chosen)} changes, {equivalent} of them equivalent, {len(survived)} survived: {', '.join(survived)}")
    return 1 if survived else 0


if __name__ == "__main__":
    if sys.argv[1:2] not in (["--check"], ["--report"]):
        import compressed_tensors  # noqa: F401
        import hypothesis  # noqa: F401
        import pytest
        import torch  # noqa: F401
        from transformers import LlamaForCausalLM, LlavaForConditionalGeneration  # noqa: F401
    sys.exit(main(sys.argv[1:]))
