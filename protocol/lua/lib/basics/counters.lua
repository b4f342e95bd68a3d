-- HINCRBY for a field that may hold something else: what is no number counts as 0. Returns the sum.
local function add(name, field, by)
  local sum = redis.pcall('HINCRBY', name, field, by)
  if type(sum) ~= 'table' then return sum end
  redis.call('HSET', name, field, by)
  return by
end

local tallied = {}

-- As count(), for what a script counts many times: written by write_tally().
local function tally(event, queue)
  local field = event .. ':' .. queue
  tallied[field] = (tallied[field] or 0) + 1
end

local function write_tally()
  for field, number in pairs(tallied) do add(KEY.counters, field, number) end
end

local function count(event, queue, by)
  add(KEY.counters, event .. ':' .. queue, by or 1)
end
