--- @include lib/basics/numbers
--- @include lib/basics/time

-- The course of an execution that has ended, `claimed:seq:at`: when it was claimed (ms), and number and ms of the
-- checkpoint that it leaves. Nothing else keeps the times of earlier executions.
local function course(id)
  local claimed = redis.call('HGET', KEY.job .. id, 'claimed')
  local point = redis.call('HMGET', KEY.checkpoint .. id, 'seq', 'at')
  return table.concat({ int(number_of(claimed)), int(number_of(point[1])), int(number_of(point[2])) }, ':')
end

-- Add a line to a request's history: tab-separated, so that redis-cli shows it as it is. Two more columns follow the
-- reason where they are known: the course of an execution that ended, and what a dead worker left behind (stacks). An
-- older release shows them as part of the reason. at: ms, if it was not just now.
local function history(id, event, worker, execution, offset, kind, reason, evidence, at)
  local plain = string.gsub(string.sub(reason or '', 1, 500), '[\t\r\n]', ' ')
  local name = KEY.history .. id
  local line = { at or now_text, event, worker or '', execution or '', offset or '0', kind or '', plain }
  local ends = { redelivered = true, retry = true, released = true, failed = true, canceled = true, stopped = true,
    finished = true }
  if ends[event] and line[4] ~= '' then line[8] = course(id) end
  if (evidence or '') ~= '' then
    line[8] = line[8] or ''
    line[9] = evidence
  end
  redis.call('RPUSH', name, table.concat(line, '\t'))
  redis.call('LTRIM', name, -200, -1)
  redis.call('EXPIRE', name, DAY)
end
