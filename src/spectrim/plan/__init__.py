"""The plan, the rules that score options, and the allocator that spends bytes."""

from spectrim.plan.plan import Plan, PlanRow, plan_row

__all__ = ["Plan", "PlanRow", "plan_row"]
