-- Move retries and delayed requests that are due to the end of their queues.
--
-- ARGV limit         per queue, at most 128
-- EACH queue: queue  queue names
--
-- Returns  how many were moved, as text
local limit = math.min(tonumber(arg()), 128)
local moved = 0
for _ = 1, tonumber(arg()) do
  local queue = arg()
  moved = moved + promote(queue, limit)
end
return int(moved)
