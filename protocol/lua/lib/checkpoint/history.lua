--- @include lib/basics/numbers
--- @include lib/basics/time

-- The course of an execution that has ended, `claimed:seq:at`: when it was claimed (ms), and number and ms of the
-- checkpoint that it leaves. Nothing else keeps the times of earlier executions.
local function course(claimed, seq, at)
  return table.concat({ int(number_of(claimed)), int(number_of(seq)), int(number_of(at)) }, ':')
end

local function read_course(id)
  local point = redis.call('HMGET', KEY.checkpoint .. id, 'seq', 'at')
  return course(redis.call('HGET', KEY.job .. id, 'claimed'), point[1], point[2])
end

local ENDS = { redelivered = true, retry = true, released = true, failed = true, canceled = true, stopped = true,
  finished = true }
local said, plain -- a sweep says the same of thousands

-- Add a line to a request's history: tab-separated, so that redis-cli shows it as it is. Two more columns follow the
-- reason where they are known: the course of an execution that ended, and what a dead worker left behind (stacks). An
-- older release shows them as part of the reason. at: ms, if it was not just now. ran: the course, if it is known.
local function history(id, event, worker, execution, offset, kind, reason, evidence, at, ran)
  if reason ~= said or not plain then
    said, plain = reason, string.gsub(string.sub(reason or '', 1, 500), '[\t\r\n]', ' ')
  end
  local name = KEY.history .. id
  local line = { at or now_text, event, worker or '', execution or '', offset or '0', kind or '', plain }
  if ENDS[event] and line[4] ~= '' then line[8] = ran or read_course(id) end
  if (evidence or '') ~= '' then
    line[8] = line[8] or ''
    line[9] = evidence
  end
  if redis.call('RPUSH', name, table.concat(line, '\t')) > 200 then redis.call('LTRIM', name, -200, -1) end
  redis.call('EXPIRE', name, DAY)
end
