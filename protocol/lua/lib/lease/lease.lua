--- @include lib/basics/numbers
--- @include lib/basics/time

-- How long a lease lasts (ms): one and a half times the request's own step timeout (step_ms of its hash), else
-- what the worker says, which knows the task's.
local function lease_length(step_ms, lease_ms)
  return step_ms and 1.5 * number_of(step_ms, lease_ms / 1.5) or lease_ms
end

-- A plain job is one step of up to its timeout (s); with timeout -1 only the heartbeat watches it. In ms.
local function plain_lease(timeout)
  return timeout > 0 and timeout * 1000 + 30000 or 10 * 365 * DAY * 1000
end
