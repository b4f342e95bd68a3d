--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/pool/places
--- @include lib/pool/serves
--- @include lib/queue/ring

-- Of each living worker, at most 128: its queues, its place, and whether it holds nothing.
local function read_living(incarnation)
  local found = {}
  for _, other in ipairs(redis.call('ZRANGEBYSCORE', KEY.beats, '(' .. now_text, '+inf', 'LIMIT', 0, 128)) do
    local record = other ~= incarnation and redis.call('HMGET', KEY.incarnation .. other, 'ready', 'queues', 'worker')
    if record and record[1] == '1' then
      found[#found + 1] = { queues = record[2] or '', place = where(other, record[3] or ''),
        empty = redis.call('EXISTS', KEY.held .. other) == 0 }
    end
  end
  return found
end

-- Both read once: a claim looks at up to 128 requests.
local here, living

-- Whether a request with `failed_on` failed here, and is left to another worker for a while. suspect: it runs only on a
-- worker that holds nothing.
local function passed_over(id, queue, job, suspect, incarnation, worker)
  here = here or where(incarnation, worker)
  if not failed_there(job.failed_on, here) then return false end
  local waited = job.passed_at and now_ms - number_of(job.passed_at) or 0
  if waited < 0 or waited >= 2000 then return false end
  living = living or read_living(incarnation)
  for _, other in ipairs(living) do
    local may = serves(other.queues, queue) and (other.empty or not suspect)
    if may and not failed_there(job.failed_on, other.place) then
      -- Once: the other is woken now, and this one is not to be woken by its own bell until then.
      if redis.call('HSETNX', KEY.job .. id, 'passed_at', now_text) == 1 then ring(queue) end
      return true
    end
  end
  return false
end
