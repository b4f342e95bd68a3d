--- @include lib/basics/time

-- Seconds since 1970, with microseconds, as RQ stores them in executions and results.
local stamp = string.format('%.0f.%06d', now_s, tonumber(clock[2]))
local function timestamp()
  return stamp
end

-- The same of a moment in ms; nil if it is no number.
local function seconds_of(ms)
  local number = tonumber(ms or '')
  return number and string.format('%.6f', number / 1000) or nil
end
